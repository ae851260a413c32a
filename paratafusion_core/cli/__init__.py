"""The command ``paratafusion``: demo, sample, bench, train-demo. Bad input ends with one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from ..options import PRESETS, SOLVERS
from ..schedules import SCHEDULES
from . import bench, demo, sample, train


class _Parser(argparse.ArgumentParser):
    """One sentence instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number is allowed") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; a number is allowed") from None


def _window(text: str) -> int | str:
    try:
        return text if text in ("full", "auto") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number of at least 1, full or auto is allowed") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="paratafusion", description="Diffusion sampling solved in parallel.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    show = commands.add_parser("demo", help="draw a prompt step by step and in parallel, and compare")
    show.add_argument("--prompt", default="large red ring")
    show.add_argument("--steps", type=_whole, default=50)
    show.add_argument("--seed", type=_whole, default=0)
    show.add_argument("--out", default="paratafusion-demo", help="folder for the pictures and report.json")
    show.add_argument("--json", action="store_true", help="print the report on standard output")
    show.set_defaults(run=demo.run)

    _add_sample(commands.add_parser("sample", help="one run, with every option"))

    _add_bench(commands.add_parser("bench", help="solvers x samplers x steps into a table"))

    learn = commands.add_parser("train-demo", help="train the embedded network again")
    learn.add_argument("--out", required=True, help="folder outside the repository, for checkpoints and weights")
    learn.add_argument("--steps", type=_whole)
    learn.add_argument("--device", default="cpu")
    learn.set_defaults(run=train.run)
    return parser


def _add_bench(many: argparse.ArgumentParser) -> None:
    many.add_argument("--suite", choices=tuple(bench.SUITES), default="quick")
    many.add_argument("--seeds", type=_whole, help="of each case; the suite's own number by default")
    many.add_argument("--model", nargs="+", choices=("demo", "mixture", "ideal"), help="the suite's own by default")
    many.add_argument(
        "--resume", metavar="FILE", help="json lines of an earlier run: skip what is there, append the rest"
    )
    many.add_argument("--device", default="cpu")
    many.add_argument("--out", default="paratafusion-bench", help="folder for the json lines, the table and the plots")
    many.add_argument("--json", action="store_true", help="print the json lines on standard output")
    many.set_defaults(run=bench.run)


def _add_sample(one: argparse.ArgumentParser) -> None:
    one.add_argument("--prompt", required=True)
    one.add_argument("--model", choices=("demo", "mixture"), default="demo")
    one.add_argument("--sampler", choices=tuple(sample.SAMPLERS), default="ddim")
    one.add_argument("--schedule", choices=tuple(SCHEDULES), default="normal")
    one.add_argument("--steps", type=_whole, default=50)
    one.add_argument("--cfg", type=_real, default=4.0)
    one.add_argument("--solver", choices=SOLVERS, default="quasi-newton")
    one.add_argument("--window", type=_window, metavar="N|full|auto", help="8; 1 for collocation")
    one.add_argument("--preset", choices=tuple(PRESETS), default="balanced")
    one.add_argument("--tol", type=_real)
    one.add_argument("--order", type=_whole, metavar="K", help="of ParaTAA's equations")
    one.add_argument("--history", type=_whole, metavar="M", help="secants kept, or iterates ParaTAA sees")
    one.add_argument("--rows", type=_whole, metavar="N", help="evaluations that collocation may spend")
    one.add_argument("--target", type=_real, metavar="DB", help="fidelity that collocation works towards")
    one.add_argument("--max-rounds", type=_whole, metavar="N")
    one.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    one.add_argument("--batch", type=_whole, default=1)
    one.add_argument("--seed", type=_whole, default=0)
    one.add_argument("--out", default="paratafusion-sample")
    one.add_argument("--compare", action="store_true", help="also run sequentially and report the differences")
    one.add_argument("--json", action="store_true", help="print the report on standard output")
    one.set_defaults(run=sample.run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"paratafusion {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0
