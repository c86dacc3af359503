"""Pictures of the committed figures: memory by contender, time by classes, fraction of the floor."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from profiling import contenders, results, tables
from profiling.cases import GRADIENT
from profiling.results import Document, Row

OURS, PEER = "#d55e00", "#56749b"
# For lines; told apart by colour-blind readers too, and each has a mark of its own.
LINES = ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#8c6d31", "#666666", "#000000", "#b2182b")
MARKS = "osD^v<>ph"
MIB = 2**20


def draw(device: str, folder: pathlib.Path = results.FOLDER) -> list[pathlib.Path]:
    """Writes what the files in `folder` have the figures for; `device` is the one that ran."""
    written = []
    for name, figure in (
        ("memory", _memory(device, folder)),
        ("time_by_classes", _growth(device, folder)),
        ("fraction_of_floor", _floor(device, folder)),
    ):
        if figure is not None:
            path = folder / device / f"{name}.png"
            figure.savefig(path, dpi=130)
            written.append(path)
    return written


def _in_order(rows: dict[str, Row]) -> list[Row]:
    return [rows[c.name] for c in contenders.CONTENDERS if c.name in rows]


def _caption(figure: Figure, shown: Sequence[tuple[Document, Sequence[Row]]]) -> None:
    """Versions, dates and commands of the runs that the picture shows."""
    runs = [document.runs[key] for document, rows in shown for key in sorted({row.run for row in rows})]
    versions = " and ".join(sorted({run.versions.get("jax", "?") for run in runs}))
    dates = " and ".join(sorted({run.date[:10] for run in runs}))
    commands = "\n".join(dict.fromkeys(run.command for run in runs))
    figure.supxlabel(f"jax {versions}, {dates}:\n{commands}", fontsize=7, color="0.4")


def _memory(device: str, folder: pathlib.Path) -> Figure | None:
    """Temporaries of value and gradient: one panel a device, bars by contender."""
    panels: list[tuple[str, Document, list[Row]]] = []
    for place in (device, "h100", "v5e"):
        document = results.load_or_empty(results.path_of(place, "memory", folder))
        case = document.main_case()
        rows = [r for r in _in_order(document.rows_of(case.name, GRADIENT)) if "temporaries" in r.figures]
        if rows:
            ran = "as XLA plans them" if place == device else "compiled ahead of time"
            panels.append((f"{place}\n{case.name}, {ran}", document, rows))
    if not panels:
        return None
    heights = [len(rows) for _, _, rows in panels]
    figure = Figure(figsize=(8, 1.1 * len(panels) + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (title, _, rows) in zip(axes, panels, strict=True):
        values = [row.figures["temporaries"] / MIB for row in rows]
        _bars(ax, rows, values, [f"{v:,.0f}" if v >= 10 or v == 0 else f"{v:.2f}" for v in values])
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("temporary memory of value and gradient, MiB", fontsize=8)
    _caption(figure, [(document, rows) for _, document, rows in panels])
    return figure


def _bars(ax: Axes, rows: Sequence[Row], values: Sequence[float], labels: Sequence[str]) -> None:
    names = [tables.title_of(row.contender) for row in rows]
    colours = [OURS if row.contender.startswith("ours") else PEER for row in rows]
    bars = ax.barh(names, values, color=colours, height=0.7)
    ax.bar_label(bars, labels=labels, padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(*values, 1))
    ax.tick_params(labelsize=8)
    for name, row in zip(ax.get_yticklabels(), rows, strict=True):
        if row.contender.startswith("ours"):
            name.set(color=OURS, weight="bold")
    ax.spines[["top", "right"]].set_visible(False)


def _growth(device: str, folder: pathlib.Path) -> Figure | None:
    """Time by the number of classes, both on log axes, with the slope in the legend."""
    document = results.load_or_empty(results.path_of(device, "growth", folder))
    rows = _in_order(document.rows_of("classes", GRADIENT))
    if not rows:
        return None
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    ax = figure.subplots()
    peers = 0
    for row in rows:
        ours = row.contender.startswith("ours")
        slope = row.figures["slope"]
        label = tables.title_of(row.contender) + ("" if slope is None else f": slope {slope:.2f}")
        style: dict[str, Any] = (
            {"color": OURS, "linewidth": 2.5} if ours else {"color": LINES[peers % len(LINES)], "linewidth": 1.3}
        )
        milliseconds = [1e3 * s for s in row.figures["seconds"]]
        ax.plot(row.figures["sizes"], milliseconds, label=label, marker=MARKS[peers % len(MARKS)], ms=4, **style)
        peers += not ours
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sizes = rows[0].figures["sizes"]
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"classes (batch of {rows[0].figures['other_side']}, float32 logits)")
    ax.set_ylabel("value and gradient, ms (median)")
    ax.grid(True, which="major", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"Time by the number of classes, {device}", fontsize=10, loc="left")
    ax.legend(fontsize=8, frameon=False)
    _caption(figure, [(document, rows)])
    return figure


def _floor(device: str, folder: pathlib.Path) -> Figure | None:
    """How near each contender comes to reading its inputs and writing its gradient at the rate of a copy."""
    document = results.load_or_empty(results.path_of(device, "speed", folder))
    case = document.main_case()
    rows = _in_order(document.rows_of(case.name, GRADIENT))
    if not rows:
        return None
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), layout="constrained")
    ax = figure.subplots()
    values = [100 * row.figures["fraction_of_floor"] for row in rows]
    times = [tables.milliseconds(row.figures["seconds"]) for row in rows]
    _bars(ax, rows, values, [f"{v:.0f} %   {t} ms" for v, t in zip(values, times, strict=True)])
    ax.set_xlim(0, 1.3 * max(values))
    ax.set_xlabel("of the floor, %: logits and labels read, gradient written, at the rate of x + 1", fontsize=8)
    ax.set_title(f"Value and gradient of {case.name}, {device}", fontsize=10, loc="left")
    _caption(figure, [(document, rows)])
    return figure
