"""The embedded default: a tiny model, a tiny task and the real pipeline, offline and on a CPU.

`tether.demo.run.run_demo` is the whole line; the other files are its steps: `task` and `pretrain` make what a user
would bring (pairs and a model), `compare` is what a user would write, `show` tells what came out. Nothing else in
the library depends on this folder.
"""
