"""The end of a session: two tables and a picture."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import rich.box
import rich.console
import rich.table

from phenotypes.memory import StepMemory
from phenotypes.metrics import Reliability, Scores
from phenotypes.settings import Focus
from phenotypes.training import CURVE_DISEASES, Run

MEBIBYTE = 2**20
# Told apart by colour-blind readers too.
COLOURS = {"BCE": "#0072b2", "focal": "#e69f00", "ASL": "#d55e00", "adaptive": "#009e73"}


# Of predicted probabilities: as wide each as a fifth of a power of ten, and one below all of them.
RELIABILITY_BINS = np.concatenate([[0.0], np.logspace(-5, 0, 26)])


@dataclasses.dataclass
class Results:
    """What has been measured so far; every field may still be empty."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    test: dict[str, list[Scores]] = dataclasses.field(default_factory=dict)  # of each seed
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # the baselines' P@5
    memory: list[StepMemory] = dataclasses.field(default_factory=list)
    # By the sigmoid and by the link, of the first seed.
    reliability: dict[Focus, tuple[Reliability, Reliability]] = dataclasses.field(default_factory=dict)

    def has_curves(self) -> bool:
        return any(run.curve for run in self.runs)

    def of_losses(self) -> dict[Focus, list[Run]]:
        """The runs that came to an epoch's end, by their loss."""
        found: dict[Focus, list[Run]] = {}
        for run in self.runs:
            if run.curve:
                found.setdefault(run.focus, []).append(run)
        return found


def run_name(run: Run, epochs: int) -> str:
    """A run's name in tables: the loss with its numbers, and how far it came if not to the end."""
    name = f"{run.focus.name} {run.focus.numbers}"
    if run.complete:
        return name
    return f"{name}, stopped at epoch {run.curve[-1].epoch if run.curve else 0:.1f} of {epochs}"


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Their mean, and with several their standard deviation."""
    if not numbers:
        return "-"
    mean = f"{np.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}"


def print_runs(results: Results, epochs: int, console: rich.console.Console) -> None:
    """All runs as the validation split sees them."""
    table = rich.table.Table(
        title=f"Validation, after the last epoch (micro AP over {CURVE_DISEASES} diseases at most)",
        box=rich.box.SIMPLE_HEAVY,
    )
    table.add_column("loss (gamma_neg, gamma_pos, clip)", no_wrap=True)
    for column in ("P@5", "micro AP", "gap", "dropped", "gamma_neg", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, precision in results.validation.items():
        table.add_row(name, f"{precision:.3f}", *[""] * 5)
    for runs in results.of_losses().values():
        ends, told = [run.curve[-1] for run in runs], [run.told[-1] for run in runs]
        table.add_row(
            run_name(runs[-1], epochs),
            spread([end.precision_at_5 for end in ends]),
            spread([end.micro_average_precision for end in ends if end.micro_average_precision is not None]),
            spread([step.probability_gap for step in told], 2),
            spread([step.dropped_share for step in told], 2),
            spread([step.gamma_neg for step in told], 2),
            f"{sum(run.seconds for run in runs):.0f}",
        )
    console.print(table)


def print_test(results: Results, diseases: int, console: rich.console.Console) -> None:
    """The held-out test groups: baselines and classifiers."""
    table = rich.table.Table(title=f"Test: {diseases:,} diseases of held-out groups", box=rich.box.SIMPLE_HEAVY)
    table.add_column("", no_wrap=True)
    columns = {
        "P@1": "precision_at_1",
        "P@5": "precision_at_5",
        "micro AP": "micro_average_precision",
        "macro AP": "macro_average_precision",
        "F1": "f1",
        "ECE sigmoid": "sigmoid_error",
        "ECE link": "link_error",
    }
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, scores in results.test.items():
        cells = []
        for field in columns.values():
            numbers = [getattr(one, field) for one in scores if getattr(one, field) is not None]
            cells.append(spread(numbers, 4 if "error" in field else 3) if numbers else "-")
        table.add_row(name, *cells)
    console.print(table)


def print_memory(results: Results, console: rich.console.Console) -> None:
    """Temporary memory of the loss's step."""
    table = rich.table.Table(
        title="Temporary memory of the loss's step (value and gradient, as compiled)",
        box=rich.box.SIMPLE_HEAVY,
    )
    for column in ("batch x labels", "official formula in jnp, autodiff", "asymmetric_loss"):
        table.add_column(column, justify="right")
    for step in results.memory:
        table.add_row(
            f"{step.batch:,} x {step.labels:,}",
            f"{step.reference / MEBIBYTE:.2f} MiB",
            f"{step.ours / MEBIBYTE:.2f} MiB",
        )
    console.print(table)


def draw(results: Results, path: pathlib.Path) -> None:
    """Four panels as one PNG at `path`: learning curves, what the losses hear, calibration, memory.

    Training losses are left out: sums of different losses have no common axis. A panel without figures is left out too.
    """
    panels = [_draw_curves, _draw_told]
    panels += [_draw_reliability] if results.reliability else []
    panels += [_draw_memory] if results.memory else []
    figure = matplotlib.figure.Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, results)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        title="loss (gamma_neg, gamma_pos, clip)",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _draw_curves(axis: matplotlib.axes.Axes, results: Results) -> None:
    """The seeds' mean, and between the least and the most of them a band."""
    for focus, runs in results.of_losses().items():
        common = min(len(run.curve) for run in runs)
        epochs = [point.epoch for point in runs[0].curve[:common]]
        precision = np.array([[point.precision_at_5 for point in run.curve[:common]] for run in runs])
        axis.plot(epochs, precision.mean(axis=0), marker="o", markersize=4, **_style(focus))
        axis.fill_between(epochs, precision.min(axis=0), precision.max(axis=0), color=COLOURS[_key(focus)], alpha=0.15)
    for (name, level), dashes in zip(results.validation.items(), (":", "--"), strict=False):
        axis.axhline(level, color="black", linewidth=1, linestyle=dashes, zorder=1, label=name)
    axis.set(title="Precision at 5", ylabel="validation P@5 (share of the 5)", xlabel="epoch")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def _draw_told(axis: matplotlib.axes.Axes, results: Results) -> None:
    """The probability gap, and with thin lines the share of negatives that the margin drops, of the first seed."""
    for focus, (run, *_) in results.of_losses().items():
        steps = [told.step for told in run.told]
        colour = COLOURS[_key(focus)]
        axis.plot(steps, [told.probability_gap for told in run.told], color=colour, linewidth=1.8)
        if focus.clip:
            axis.plot(steps, [told.dropped_share for told in run.told], color=colour, linewidth=1, linestyle="--")
        if focus.target_gap is not None:
            axis.axhline(focus.target_gap, color=colour, linewidth=1, linestyle=":")
    axis.set(
        title="What the kernel counts",
        xlabel="step",
        ylabel="probability gap (solid), share dropped (dashed)",
        ylim=(-1.05, 1.05),
    )
    axis.grid(alpha=0.3)


def _draw_reliability(axis: matplotlib.axes.Axes, results: Results) -> None:
    """Of the first seed, on the test groups; bins of fewer than five positives say little and are left out."""
    for focus, pair in results.reliability.items():
        for found, dashes in zip(pair, ("--", "-"), strict=True):
            there = found.observed * found.pairs >= 5
            axis.plot(
                found.predicted[there],
                found.observed[there],
                color=COLOURS[_key(focus)],
                linestyle=dashes,
                linewidth=1.6 if dashes == "-" else 1.0,
            )
    axis.plot([1e-5, 1], [1e-5, 1], color="black", linewidth=1, zorder=1)
    axis.set(
        title="Calibration: link (solid), sigmoid (dashed)",
        xlabel="predicted probability",
        ylabel="share of positives",
        xscale="log",
        yscale="log",
        xlim=(1e-5, 1),
        ylim=(1e-5, 1),
    )
    axis.grid(alpha=0.3)


def _key(focus: Focus) -> str:
    return focus.name if focus.target_gap is None else "adaptive"


def _style(focus: Focus) -> dict[str, Any]:
    return {"color": COLOURS[_key(focus)], "linewidth": 2, "label": f"{focus.name} {focus.numbers}"}


def _draw_memory(axis: matplotlib.axes.Axes, results: Results) -> None:
    memory = results.memory
    sides = (
        ("official formula in jnp, autodiff", "#7a7a7a", [step.reference / MEBIBYTE for step in memory]),
        ("asymmetric_loss", COLOURS["ASL"], [step.ours / MEBIBYTE for step in memory]),
    )
    for place, (label, colour, sizes) in enumerate(sides):
        where = [i + 0.4 * (place - 0.5) for i in range(len(memory))]
        bars = axis.bar(where, sizes, width=0.38, color=colour, label=label)
        axis.bar_label(bars, [f"{size:.0f}" if size >= 10 else f"{size:.2f}" for size in sizes], padding=2)
    axis.set_xticks(range(len(memory)), [f"{step.batch:,} x {step.labels:,}" for step in memory])
    axis.set_yscale("log")
    everything = [size for _, _, sizes in sides for size in sizes]
    axis.set_ylim(min(everything) / 4, 10 * max(everything))  # room for the legend above the bars
    axis.set(title="Memory of the loss's step", xlabel="batch x labels", ylabel="temporary memory (MiB, log scale)")
    axis.legend(loc="upper left", frameon=False)
