"""The embedded default: a tiny model, a tiny task and the real pipeline, offline and on a CPU.

`tether.demo.run.run_demo` is the whole line; the other files here are its steps. Nothing in the library depends on
this folder.
"""
