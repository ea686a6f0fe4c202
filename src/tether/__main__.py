"""`python -m tether` is the command `tether`; with it, `torchrun -m tether train ...` starts several processes."""

import sys

from tether.cli import main

if __name__ == "__main__":
    sys.exit(main())
