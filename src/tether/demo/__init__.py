"""A tiny model, a tiny task and the real pipeline, offline and on a CPU.

`tether.demo.run.run_demo` runs all of it; the other files are its steps: `task` and `pretrain` make what a user
would bring (pairs and a model), `compare` is what a user would write, `show` prints the result. Nothing else in
the library depends on this folder.
"""
