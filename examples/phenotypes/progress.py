"""What training shows while it goes on, of either example."""

import time
from collections.abc import Callable, Iterable
from typing import Self

import rich.console
import rich.progress


class _Bar(rich.progress.Progress):
    beneath: Callable[[], Iterable[rich.console.RenderableType]] = tuple

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield from super().get_renderables()
        yield from self.beneath()


class TrainingProgress:
    """A bar with loss and rate on a terminal; plain lines elsewhere, where a bar would fill the log.

    Args:
      before: what stands before the bar, in rich's markup of a task.
      width: of the bar.
      loss: the loss's format.
      description: of the task.
      steps, completed: how many there are, and have been taken.
      beneath: what stands below the bar, asked for whenever it is drawn.
    """

    def __init__(
        self,
        console: rich.console.Console,
        before: str,
        width: int,
        loss: str,
        *,
        steps: int,
        completed: int = 0,
        description: str = "",
        beneath: Callable[[], Iterable[rich.console.RenderableType]] = tuple,
    ):
        self.console = console
        self.examples, self.seconds, self.mark = 0, 0.0, 0.0
        self.bar = _Bar(
            rich.progress.TextColumn(before),
            rich.progress.BarColumn(bar_width=width),
            rich.progress.TextColumn(f"loss {{task.fields[loss]:{loss}}} {{task.fields[rate]:5.0f}} examples/s"),
            rich.progress.TextColumn("{task.fields[precision]}"),
            rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar.beneath = beneath
        self.task = self.bar.add_task(
            description, total=steps, completed=completed, loss=float("nan"), rate=0.0, precision=""
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self.examples / self.seconds if self.seconds else 0.0

    def step(self, loss: float, examples: int) -> None:
        now = time.perf_counter()
        if self.mark:  # zero after a pause: neither compiling nor validating nor saving is training
            self.seconds += now - self.mark
            self.examples += examples
        self.mark = now
        self.bar.update(self.task, advance=1, loss=loss, rate=self.rate)

    def pause(self) -> None:
        self.mark = 0.0

    def show(self, precision: str, line: str) -> None:
        """After a look at other examples: beside the bar, or where there is none as a line."""
        self.pause()
        self.bar.update(self.task, precision=precision)
        if not self.console.is_terminal:
            self.console.print(line)
