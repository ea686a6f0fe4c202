"""The options of a run, and everything that is refused of them and of the run they are for (`rules`)."""
