"""The options of a run, and everything that is refused about them and the run (`rules`)."""
