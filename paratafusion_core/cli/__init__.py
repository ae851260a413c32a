"""The command ``paratafusion``: demo, sample, bench, train-demo. Bad input ends with one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from .. import __version__
from ..options import PRESETS, SOLVERS
from ..schedules import SCHEDULES
from . import bench, demo, sample, train


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the texts of the options that have one, and paragraphs as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """One sentence instead of the usage text."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **more})

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
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_demo(commands.add_parser("demo", help="draw a prompt step by step and in parallel, and compare"))
    _add_sample(commands.add_parser("sample", help="one run, with every option"))
    _add_bench(commands.add_parser("bench", help="solvers x samplers x steps into a table", epilog=_suites()))
    _add_train(commands.add_parser("train-demo", help="train the embedded network again"))
    return parser


def _add_demo(show: argparse.ArgumentParser) -> None:
    show.add_argument("--prompt", default="large red ring", help="in the embedded network's words")
    show.add_argument("--steps", type=_whole, default=50, help="of DDIM")
    show.add_argument("--seed", type=_whole, default=0, help="of the noise")
    show.add_argument("--out", default="paratafusion-demo", help="folder for the pictures and report.json")
    show.add_argument("--json", action="store_true", help="print the report on standard output")
    show.set_defaults(run=demo.run)


def _suites() -> str:
    width = max(map(len, bench.SUITES))
    return "suites:\n" + "\n".join(f"  {name:{width}}  {suite.about}" for name, suite in bench.SUITES.items())


def _add_bench(many: argparse.ArgumentParser) -> None:
    many.add_argument("--suite", choices=tuple(bench.SUITES), default="quick", help="what to run, see below")
    many.add_argument("--seeds", type=_whole, help="of each case (default: the suite's own number)")
    models = ("demo", "mixture", "ideal")
    many.add_argument("--model", nargs="+", choices=models, help="what is solved (default: the suite's own)")
    many.add_argument(
        "--resume",
        metavar="FILE",
        help="json lines of an earlier run: skip what is there, append the rest (default: begin anew)",
    )
    many.add_argument("--device", default="cpu", help="torch's name of it")
    many.add_argument("--out", default="paratafusion-bench", help="folder for the json lines, the table and the plots")
    many.add_argument("--json", action="store_true", help="print the json lines on standard output")
    many.set_defaults(run=bench.run)


def _add_sample(one: argparse.ArgumentParser) -> None:
    one.add_argument("--prompt", required=True, help="in the embedded network's words; any text for model mixture")
    one.add_argument("--model", choices=("demo", "mixture"), default="demo", help="embedded network, or closed form")
    one.add_argument("--sampler", choices=tuple(sample.SAMPLERS), default="ddim", help="whose picture is asked for")
    one.add_argument("--schedule", choices=tuple(SCHEDULES), default="normal", help="of the noise levels")
    one.add_argument("--steps", type=_whole, default=50, help="of the sampler")
    one.add_argument("--cfg", type=_real, default=4.0, help="scale of the guidance")
    one.add_argument("--solver", choices=SOLVERS, default="quasi-newton", help="how the steps are solved")
    one.add_argument(
        "--window", type=_window, metavar="N|full|auto", help="rows evaluated together (default: 8, collocation 1)"
    )
    one.add_argument("--preset", choices=tuple(PRESETS), default="balanced", help="tolerance, or target of collocation")
    one.add_argument("--tol", type=_real, help="tolerance of your own (default: the preset's); not of collocation")
    one.add_argument("--order", type=_whole, metavar="K", help="of ParaTAA's equations (default: 20, or the window)")
    one.add_argument(
        "--history", type=_whole, metavar="M", help="secants kept (default: 2), or iterates ParaTAA sees (default: 3)"
    )
    one.add_argument(
        "--rows",
        type=_whole,
        metavar="N",
        help="evaluations that collocation may spend (default: 16 at window 1, 30 from 4 on)",
    )
    one.add_argument(
        "--target", type=_real, metavar="DB", help="fidelity that collocation works towards (default: the preset's)"
    )
    one.add_argument(
        "--max-rounds", type=_whole, metavar="N", help="stop there, with the picture as it is (default: no limit)"
    )
    one.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the states and the model")
    one.add_argument("--batch", type=_whole, default=1, help="pictures")
    one.add_argument("--seed", type=_whole, default=0, help="of the noise")
    one.add_argument("--out", default="paratafusion-sample", help="folder for the picture, its numbers and report.json")
    one.add_argument("--compare", action="store_true", help="also run sequentially and report the differences")
    one.add_argument("--json", action="store_true", help="print the report on standard output")
    one.set_defaults(run=sample.run)


def _add_train(learn: argparse.ArgumentParser) -> None:
    learn.add_argument("--out", required=True, help="folder outside the repository, for checkpoints and weights")
    learn.add_argument("--steps", type=_whole, help=f"optimiser steps in all (default: {train.Recipe().steps})")
    learn.add_argument("--device", default="cpu", help="torch's name of it")
    learn.set_defaults(run=train.run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"paratafusion {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def command() -> int:
    """:func:`main` as installed: Ctrl-C ends it with a word and exit code 130, as shells have it."""
    try:
        return main()
    except KeyboardInterrupt:
        print("paratafusion: interrupted", file=sys.stderr)
        return 130
