"""Rows as tables on a terminal, one a device, kind and case."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from profiling import contenders, results
from profiling.results import Row

MIB = 2**20
Cell = Callable[[dict[str, Any]], str]


def mib(figures: dict[str, Any], name: str) -> str:
    value = figures.get(name)
    if value is None or value == 0:
        return "-" if value is None else "0"
    return f"{value / MIB:,.2f}" if value < 10 * MIB else f"{value / MIB:,.0f}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}" if value else "0"


def ratio(figures: dict[str, Any]) -> str:
    """The ratio to ours, and its interval."""
    low, high = figures["ratio_interval"]
    if figures["ratio_to_ours"] is None or low == high == 1:
        return "-" if figures["ratio_to_ours"] is None else "1"
    return f"{figures['ratio_to_ours']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def bound(figures: dict[str, Any]) -> str:
    return "-" if figures["bound"] is None else f"{'>=' if figures['at_least'] else '<='} {figures['bound']:g}"


def _compared(what: str) -> list[tuple[str, Cell]]:
    return [
        (f"{what}: abs", lambda f: error(f.get(f"{what}_abs")) if f"{what}_abs" in f else "-"),
        ("(careful)", lambda f: error(f.get(f"careful_{what}_abs")) if f"{what}_abs" in f else "-"),
        ("rel", lambda f: error(f.get(f"{what}_rel")) if f"{what}_abs" in f else "-"),
        ("(careful)", lambda f: error(f.get(f"careful_{what}_rel")) if f"{what}_abs" in f else "-"),
        ("ulps", lambda f: number(f.get(f"{what}_ulps"), ".2g") if f"{what}_abs" in f else "-"),
        ("(careful)", lambda f: number(f.get(f"careful_{what}_ulps"), ".2g") if f"{what}_abs" in f else "-"),
    ]


COLUMNS: dict[str, list[tuple[str, Cell]]] = {
    "memory": [
        ("temporaries, MiB", lambda f: mib(f, "temporaries")),
        ("traffic, MiB", lambda f: mib(f, "traffic")),
        ("floor, MiB", lambda f: mib(f, "floor")),
        ("peak over inputs, MiB", lambda f: mib(f, "peak")),
        ("compiled in, s", lambda f: seconds(f.get("compile_seconds"))),
    ],
    "speed": [
        ("median, ms", lambda f: milliseconds(f["seconds"])),
        ("quartiles, ms", lambda f: " to ".join(map(milliseconds, f["seconds_quartiles"]))),
        ("times ours (95 %)", ratio),
        ("of the floor", lambda f: percent(f["fraction_of_floor"])),
        ("on the chip, ms", lambda f: milliseconds(f["seconds_on_chip"]) if "seconds_on_chip" in f else "-"),
        ("of the floor", lambda f: percent(f["fraction_of_floor_on_chip"]) if "seconds_on_chip" in f else "-"),
        ("compiled in, s", lambda f: seconds(f["compile_seconds"])),
        ("rounds", lambda f: str(f["rounds"])),
    ],
    "growth": [
        ("slope", lambda f: number(f["slope"], ".2f")),
        ("ms by size", lambda f: ", ".join(map(milliseconds, f["seconds"]))),
        ("sizes", lambda f: ", ".join(map(str, f["sizes"]))),
    ],
    "schedule": [
        ("bundles per 1024", lambda f: number(f.get("bundles_per_1024"))),
        ("innermost", lambda f: number(f.get("innermost_per_1024"))),
        ("bundles", lambda f: number(f.get("bundles"), "d")),
        ("by depth", lambda f: "; ".join("+".join(map(str, k["bundles_by_depth"])) for k in f.get("kernels", ()))),
        ("limiting unit", lambda f: f"{f['limiting_unit']}, {percent(f['limiting_share'])}"),
        ("spills", lambda f: number(f.get("spills"), "d")),
    ],
    "schedule on CUDA": [
        ("kernels", lambda f: str(f["kernels"])),
        ("registers", lambda f: str(f["registers"])),
        ("spilled bytes", lambda f: str(f["spilled_bytes"])),
        ("widest load, bytes", lambda f: str(f["widest_load"])),
        ("PTX instructions", lambda f: str(f["instructions"])),
        ("issued per 1024 elements, by warps", lambda f: number(f["instructions_per_1024"], ",.0f")),
    ],
    "head": [
        ("figure", lambda f: f"{f['figure']:.2f} {f['unit']}"),
        ("bound", lambda f: bound(f)),
        ("", lambda f: "-" if f["bound"] is None else "holds" if f["holds"] else "[red]broken"),
    ],
    "parity": [*_compared("loss"), *_compared("gradient"), ("", lambda f: "holds" if f["holds"] else "[red]broken")],
}


def of(rows: Iterable[Row]) -> list[Table]:
    grouped: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        first, second = (row.contender, row.case) if row.kind == "parity" else (row.case, row.mode)
        grouped.setdefault((row.kind, row.device, first, second), []).append(row)
    return [_table(*key, group) for key, group in grouped.items()]


def _table(kind: str, device: str, first: str, second: str, rows: list[Row]) -> Table:
    table = Table(title=f"{kind}, {device}: {first}, {second}", title_justify="left")
    cuda = kind == "schedule" and any("registers" in row.figures for row in rows)
    columns = COLUMNS["schedule on CUDA" if cuda else kind]
    table.add_column("region" if kind == "parity" else "contender", no_wrap=True)
    # Columns that no row has anything in are left out.
    cells = {id(row): [cell(row.figures) for _, cell in columns] if row.measured else [] for row in rows}
    shown = [k for k in range(len(columns)) if any(c and c[k] != "-" for c in cells.values())]
    for k in shown:
        table.add_column(columns[k][0], justify="right")
    notes = any(row.note or not row.measured for row in rows)
    if notes:
        table.add_column("note", max_width=60)
    for row in rows:
        style = "red" if row.status == results.FAILED or row.broken else None
        found = cells[id(row)]
        values = [found[k] if found else "-" for k in shown]
        note = [f"{row.status}: {row.note}" if not row.measured else row.note] if notes else []
        table.add_row(row.mode if kind == "parity" else row.contender, *values, *note, style=style)
    copy = next((row.figures["copy_bytes_per_second"] for row in rows if "copy_bytes_per_second" in row.figures), None)
    if copy is not None:
        table.caption = f"a copy (x + 1) moves {copy / 1e9:.2f} GB/s"
        by_chip = next(
            (r.figures["copy_bytes_per_second_on_chip"] for r in rows if "seconds_on_chip" in r.figures), None
        )
        if by_chip is not None:
            table.caption += f", on the chip {by_chip / 1e9:.2f}"
    return table


def as_text(tables: Iterable[Table], width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def title_of(name: str) -> str:
    """A contender's title; its name where the list no longer has it."""
    return next((c.title for c in contenders.CONTENDERS if c.name == name), name)
