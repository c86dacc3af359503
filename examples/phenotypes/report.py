"""The end of a session: two tables and a picture."""

import dataclasses
import pathlib
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker
import rich.box
import rich.console
import rich.table

from phenotypes.memory import StepMemory
from phenotypes.metrics import Scores
from phenotypes.training import CURVE_DISEASES, Run

MEBIBYTE = 2**20
COLOURS = {"BCE": "#0072b2", "focal": "#e69f00", "ASL": "#d55e00"}  # told apart by colour-blind readers too


@dataclasses.dataclass
class Results:
    """What has been measured so far; every field may still be empty."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    chosen: Run | None = None
    test: dict[str, Scores] = dataclasses.field(default_factory=dict)
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # the baselines' P@5
    memory: list[StepMemory] = dataclasses.field(default_factory=list)

    @property
    def searched(self) -> bool:
        """Whether there was a choice: more than one ASL setting was trained."""
        return sum(run.focus.name == "ASL" for run in self.runs) > 1

    def has_curves(self) -> bool:
        return any(run.curve for run in self.runs)


def run_name(run: Run, epochs: int) -> str:
    """A run's name in tables: the loss with its numbers, and how far it came if not to the end."""
    name = f"{run.focus.name} {run.focus.numbers}"
    if run.complete:
        return name
    return f"{name}, stopped at epoch {run.curve[-1].epoch if run.curve else 0:.1f} of {epochs}"


def print_runs(results: Results, epochs: int, console: rich.console.Console) -> None:
    """All runs as the validation split sees them, with the one ASL setting that it chose."""
    table = rich.table.Table(
        title=f"Validation, after the last epoch (micro AP over {CURVE_DISEASES} diseases at most)",
        box=rich.box.SIMPLE_HEAVY,
    )
    table.add_column("loss (gamma_neg, gamma_pos, clip)", no_wrap=True)
    for column in ("P@5", "micro AP", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, precision in results.validation.items():
        table.add_row(name, f"{precision:.3f}", "", "", "")
    for run in results.runs:
        if run.curve:
            last = run.curve[-1]
            table.add_row(
                run_name(run, epochs),
                f"{last.precision_at_5:.3f}",
                f"{last.micro_average_precision:.3f}",
                f"{run.seconds:.0f}",
                "chosen" if results.searched and run is results.chosen else "",
            )
    console.print(table)


def print_test(results: Results, diseases: int, console: rich.console.Console) -> None:
    """The held-out test groups: baselines and classifiers."""
    table = rich.table.Table(title=f"Test: {diseases:,} diseases of held-out groups", box=rich.box.SIMPLE_HEAVY)
    table.add_column("", no_wrap=True)
    for column in ("P@1", "P@5", "micro AP", "macro AP", "over popularity"):
        table.add_column(column, justify="right")
    popularity = next(iter(results.test.values())).precision_at_5
    for name, scores in results.test.items():
        table.add_row(
            name,
            f"{scores.precision_at_1:.3f}",
            f"{scores.precision_at_5:.3f}",
            f"{scores.micro_average_precision:.3f}",
            f"{scores.macro_average_precision:.3f}",
            f"{scores.precision_at_5 / popularity:.2f}" if popularity else "-",
        )
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
    """Validation curves and, where it was measured, the memory of the loss's step, as one PNG at `path`.

    Training losses are left out: sums of different losses have no common axis.
    """
    panels = 3 if results.memory else 2
    figure = matplotlib.figure.Figure(figsize=(5 * panels, 5.2), layout="constrained")
    axes = figure.subplots(1, panels)
    ladder = [run for run in results.runs if run.focus.name == "ASL" and run is not results.chosen]
    for run in results.runs:
        if not run.curve:
            continue
        aside = run in ladder
        style = {
            "color": "#9a9a9a" if aside else COLOURS[run.focus.name],
            "linewidth": 1.2 if aside else 2.2,
            "linestyle": ("-", "--", ":", "-.")[ladder.index(run) % 4] if aside else "-",
            "marker": None if aside else "o",
            "markersize": 4,
            "zorder": 2 if aside else 3,
            "label": f"{run.focus.name} {run.focus.numbers}"
            + (", chosen" if results.searched and run is results.chosen else ""),
        }
        epochs = [point.epoch for point in run.curve]
        if len(epochs) == 1:
            style["marker"] = "o"  # a line needs two points
        axes[0].plot(epochs, [point.precision_at_5 for point in run.curve], **style)
        axes[1].plot(epochs, [point.micro_average_precision for point in run.curve], **style)
    for (name, level), dashes in zip(results.validation.items(), (":", "--"), strict=False):
        axes[0].axhline(level, color="black", linewidth=1, linestyle=dashes, zorder=1, label=name)
    axes[0].set(title="Precision at 5", ylabel="validation P@5 (share of the 5)")
    axes[1].set(
        title=f"Average precision, micro ({CURVE_DISEASES} diseases at most)", ylabel="validation micro AP (0 to 1)"
    )
    for axis in axes[:2]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if results.memory:
        _draw_memory(axes[2], results.memory)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        title="loss (gamma_neg, gamma_pos, clip)",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _draw_memory(axis: matplotlib.axes.Axes, memory: Sequence[StepMemory]) -> None:
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


def chosen_on_validation(runs: Sequence[Run]) -> Run | None:
    """The ASL run with the highest P@5 on the validation split; a run that was cut short only if none is complete."""
    candidates = [run for run in runs if run.focus.name == "ASL" and run.curve]
    complete = [run for run in candidates if run.complete]
    return max(complete or candidates, key=lambda run: run.curve[-1].precision_at_5, default=None)
