"""python -m profiling: what the loss costs and how exact it is, beside its peers, here and on absent chips.

Exit status: 0; 1 where a contender failed, a bound is broken or the README disagrees; 2 for a wrong command line; 130
where Ctrl-C cut the session short, which keeps what it has.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from profiling import local

local.choose_backend()

COMMANDS = {
    "memory": "temporaries, traffic and peaks, here and compiled for TPU v5e, v6e, tpu7x and an H100",
    "speed": "times on the device at hand beside its copy bandwidth, and how they grow",
    "schedule": "TPU bundles, H100 registers and instructions, from the compilers' own output",
    "parity": "every implementation against float64; exit status 1 if a bound is broken",
    "report": "all of these, as JSON, pictures and the README's tables",
    "bounds": "the figures that have to hold, and whether they do",
    "head": "the linear head without logits beside the one with them",
    "pod": "how the loss scales over a TPU pod",
}
# These have no options.
WHOLE = ("bounds", "pod")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m profiling", description=__doc__.partition("\n")[0])
    commands = found.add_subparsers(dest="command", metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in WHOLE:
            continue
        command.add_argument(
            "--quick", action="store_true", help="the main cases, fewer rounds, nothing slow to compile"
        )
        if name != "head":
            command.add_argument("--only", action="append", metavar="CONTENDER", help="this contender; several: again")
        if name not in ("parity", "head"):  # these have logits of their own, or none
            command.add_argument("--case", action="append", metavar="CASE", help="this case; several: again")
        command.add_argument(
            "--target", action="append", metavar="TARGET", help="local, v5e, v6e, tpu7x or h100; again"
        )
        command.add_argument("--json", action="store_true", help="rows as JSON on standard output")
        if name == "report":
            command.add_argument(
                "--check", action="store_true", help="only say whether the README agrees with the JSON"
            )
            command.add_argument(
                "--redraw", action="store_true", help="pictures and tables from the JSON, no measuring"
            )
    return found


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help()
        return 0
    if options.command in WHOLE:
        return importlib.import_module(f"profiling.{options.command}").main()
    return measured(options, arguments)


def measured(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import jax
    from rich.console import Console

    from profiling import report, results, tables
    from profiling.cases import UnknownName
    from profiling.session import Request, Session

    # What isn't a terminal gets lines that hold a whole table.
    console, errors = Console(width=None if sys.stdout.isatty() else 170), Console(stderr=True)
    if options.command == "report" and options.check:
        return report.check(console)
    if options.command == "report" and options.redraw:
        report.redraw(console)
        return 0
    try:
        request = Request(jax.default_backend(), options.quick, *_names(options))
    except UnknownName as error:
        errors.print(f"python -m profiling: {error}", style="red", markup=False)
        return 2
    session, run = Session(request, errors), results.this_run(arguments)
    try:
        if options.command == "report":
            report.measure(session, run)
        else:
            report.PARTS[options.command](session)
    except KeyboardInterrupt:
        session.cut_short = True
    if options.json:
        print(results.as_json(session.rows, run))
    else:
        for table in tables.of(session.rows):
            console.print(table)
        versions = ", ".join(f"{package} {version}" for package, version in run.versions.items())
        console.print(f"{run.machine}; {versions}; {run.date}; {run.commit}; {run.command}", markup=False)
    if options.command == "report":
        report.redraw(errors if options.json else console)
    if not session.rows:
        errors.print("python -m profiling: no case is for these targets and contenders", markup=False)
        return 2
    if session.cut_short:
        errors.print("cut short: this is what there was so far", style="yellow")
        return 130
    return 1 if session.failed else 0


def _names(options: argparse.Namespace) -> list[tuple[str, ...] | None]:
    """--only, --case and --target: each repeated, or with commas."""
    found: list[tuple[str, ...] | None] = []
    for given in (getattr(options, "only", None), getattr(options, "case", None), options.target):
        found.append(None if given is None else tuple(name for part in given for name in part.split(",") if name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
