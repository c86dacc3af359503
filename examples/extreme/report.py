"""What a session shows: progress, the learning curve and the memory of the train step."""

import dataclasses
import time

import rich.box
import rich.console
import rich.progress
import rich.table

from extreme.memory import StepMemory

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Point:
    """Precision on the held-out examples after so many steps, and the mean loss of the steps since the last look."""

    steps: int
    loss: float | None
    precision_at_1: float
    precision_at_5: float


class Progress:
    """A bar with loss and rate on a terminal; a plain line at each look elsewhere, where a bar would fill the log."""

    def __init__(self, console: rich.console.Console, steps: int, batch: int):
        self.console = console
        self.batch = batch
        self.steps = steps
        self.timed, self.seconds, self.mark = 0, 0.0, 0.0
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TextColumn("loss {task.fields[loss]:6.2f} {task.fields[rate]:5.0f} examples/s"),
            rich.progress.TextColumn("{task.fields[precision]}"),
            rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, loss=float("nan"), rate=0.0, precision="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def rate(self) -> float:
        return self.timed * self.batch / self.seconds if self.seconds else 0.0

    def step(self, loss: float) -> None:
        now = time.perf_counter()
        if self.mark:  # zero after a look, and before the first step, which compiles
            self.seconds += now - self.mark
            self.timed += 1
        self.mark = now
        self.bar.update(self.task, advance=1, loss=loss, rate=self.rate)

    def look(self, point: Point) -> None:
        self.mark = 0.0
        self.bar.update(self.task, precision=f"P@1 {point.precision_at_1:.3f}")
        if not self.console.is_terminal:
            loss = f"loss {point.loss:.2f}  {self.rate:.0f} examples/s  " if point.loss is not None else ""
            self.console.print(
                f"step {point.steps}/{self.steps}  {loss}held-out P@1 {point.precision_at_1:.3f}  "
                f"P@5 {point.precision_at_5:.3f}"
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
