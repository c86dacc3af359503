"""What a session shows: progress, the learning curve and the memory of the train step."""

import dataclasses

import rich.box
import rich.console
import rich.table

from extreme.memory import StepMemory
from phenotypes.progress import TrainingProgress

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Point:
    """Precision on the held-out examples after so many steps, and the mean loss of the steps since the last look."""

    steps: int
    loss: float | None
    precision_at_1: float
    precision_at_5: float


class Progress(TrainingProgress):
    """A plain line is a look's."""

    def __init__(self, console: rich.console.Console, steps: int):
        super().__init__(console, "step {task.completed}/{task.total}", 16, "6.2f", steps=steps)
        self.steps = steps

    def look(self, point: Point) -> None:
        precision = f"P@1 {point.precision_at_1:.3f}"
        loss = f"loss {point.loss:.2f}  {self.rate:.0f} examples/s  " if point.loss is not None else ""
        self.show(
            precision,
            f"step {point.steps}/{self.steps}  {loss}held-out {precision}  P@5 {point.precision_at_5:.3f}",
        )


def print_curve(curve: list[Point], popularity: list[float], console: rich.console.Console) -> None:
    """Popularity, and every look at the held-out examples."""
    table = rich.table.Table(title="Precision on the held-out examples", box=rich.box.SIMPLE_HEAVY)
    table.add_column("", no_wrap=True)
    for column in ("P@1", "P@5", "loss"):
        table.add_column(column, justify="right")
    table.add_row("the commonest labels for everyone", *(f"{precision:.3f}" for precision in popularity), "")
    for point in curve:
        loss = f"{point.loss:.2f}" if point.loss is not None else ""
        name = f"after {point.steps} steps" if point.loss is not None else "before training"
        table.add_row(name, f"{point.precision_at_1:.3f}", f"{point.precision_at_5:.3f}", loss)
    console.print(table)


def print_memory(
    fused: StepMemory,
    unfused: StepMemory,
    shape: tuple[int, int],
    resident: int,
    console: rich.console.Console,
) -> None:
    """Of the step that ran and of its unfused twin, `shape` being examples and labels."""
    table = rich.table.Table(
        title=f"Memory of a train step, {shape[0]:,} examples x {shape[1]:,} labels, MiB", box=rich.box.SIMPLE_HEAVY
    )
    table.add_column("", no_wrap=True)
    table.add_column("fused head, ids as labels", justify="right")
    table.add_column("with logits, int8 labels: compiled, not run", justify="right")
    for name, value in (
        ("parameters and optimizer state", lambda step: step.state),
        ("labels", lambda step: step.labels),
        ("temporaries, gradients among them", lambda step: step.temporaries),
        ("peak, as compiled", lambda step: step.peak),
    ):
        table.add_row(name, *(f"{value(step) / MEBIBYTE:,.2f}" for step in (fused, unfused)))
    table.add_row("peak of the whole process, measured", f"{resident / MEBIBYTE:,.0f}", "-")
    console.print(table)
