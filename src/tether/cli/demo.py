"""`tether demo`: the embedded default. Reads three options; the work is `tether.demo`'s."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tether.cli import EXIT_DONE
from tether.cli.refusing_parser import RefusingParser, refuse_unknown

_ABOUT = """\
The whole line on a task whose answers a rule can check, offline and on a CPU: trains a tiny tokenizer
and language model from nothing, samples answers, labels right against wrong, and runs DPO on these
pairs with each of the four references (explicit, implicit, precomputed, synchronized). Prints one
table and writes report.html with the curves.
"""


def run(argv: Sequence[str]) -> int:
    parser = RefusingParser(
        prog="tether demo",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir", "--output-dir", metavar="FOLDER", default="tether-demo", help="folder to write [%(default)s]"
    )
    parser.add_argument("--seed", metavar="INT", type=int, default=0, help="of everything random [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="fewer steps: shows that it runs, not how well")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        refuse_unknown(f"`{unknown[0]}` after `{parser.prog}`", name, vars(options), parser.prog, dashes="--")
    from tether.cli.quiet import quiet_deepspeed  # not before --help: both load torch

    quiet_deepspeed()
    from tether.demo.run import run_demo

    run_demo(options.output_dir, seed=options.seed, quick=options.quick)
    return EXIT_DONE
