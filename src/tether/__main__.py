"""`python -m tether` is the command `tether`; with it, `torchrun -m tether train ...` starts several processes."""

from tether.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
