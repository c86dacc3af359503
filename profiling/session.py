"""One session of measuring: what was asked for, a progress bar, the rows so far, and an end that keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from profiling import cases, contenders, local, results, targets
from profiling.cases import BACKENDS, Case
from profiling.contenders import Contender, Unserved
from profiling.results import Row


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for; None where it asked for everything."""

    backend: str
    quick: bool = False
    only: tuple[str, ...] | None = None
    case: tuple[str, ...] | None = None
    target: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Unknown names are an error before anything is measured."""
        self.cases(), self.contenders(), self.places()

    def cases(self) -> tuple[Case, ...]:
        return cases.select(self.case, self.quick)

    def contenders(self) -> tuple[Contender, ...]:
        return contenders.select(self.only)

    def places(self) -> tuple[str, ...]:
        return cases.select_targets(self.target, self.backend)

    def whole(self, case: Case) -> bool:
        """Whether everything is measured on this case: a main one, or one that was asked for by name."""
        return self.case is not None or case.name in cases.MAIN

    def left_out(self, place: str, contender: Contender) -> str:
        """Why --quick doesn't compile a contender for a place, or nothing."""
        slow = self.quick and place in targets.TPU and contender.slow
        return "--quick compiles for a TPU what takes seconds, not a minute" if slow else ""

    def with_ours(self, place: str) -> tuple[Contender, ...]:
        """The contenders at a place, with the one of ours that all others are compared with."""
        default = contenders.default(place)
        chosen = contenders.at(place, self.contenders())
        return chosen if default in chosen else (default, *chosen)


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to be measured: where it belongs, and how its figures are got."""

    kind: str
    place: str
    case: Case
    contender: Contender
    mode: str
    measure: Callable[[], dict[str, Any]]
    left_out: str = ""

    def row(self, **result: Any) -> Row:
        return Row(self.kind, device_of(self.place), self.case.name, self.contender.name, self.mode, **result)


def device_of(place: str) -> str:
    """The folder of a place's results: this machine's for the backend at hand, else the chip that is compiled for."""
    return local.slug() if place in BACKENDS else place


class Session:
    """Runs jobs and keeps their rows, whatever becomes of one of them.

    A contender that raises has a row that says so, and the others go on. Ctrl-C ends the measuring and keeps the rows;
    `cut_short` says that it happened.
    """

    def __init__(self, request: Request, console: Console | None = None):
        self.request = request
        self.rows: list[Row] = []
        self.cut_short = False
        self.console = console or Console(stderr=True)

    @property
    def failed(self) -> bool:
        return any(row.status == results.FAILED or row.broken for row in self.rows)

    def run(self, title: str, jobs: Sequence[Job]) -> None:
        with self.progress() as progress:
            task = progress.add_task(title, total=len(jobs))
            for job in jobs:
                progress.update(task, description=f"{title}: {job.place} {job.case.name} {job.contender.name}")
                try:
                    self.rows.append(attempt(job))
                except KeyboardInterrupt:
                    self.cut_short = True
                    return
                progress.advance(task)
            progress.update(task, description=title)

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console, transient=True)


def attempt(job: Job) -> Row:
    """The job's row: its figures, or why there are none."""
    if job.left_out:
        return job.row(status=results.LEFT_OUT, note=job.left_out)
    missing = job.contender.missing(job.place)
    if missing:
        return job.row(status=results.MISSING, note=missing)
    try:
        job.contender.check(job.case)
        return job.row(figures=job.measure())
    except targets.MissingCompiler as reason:
        return job.row(status=results.MISSING, note=str(reason))
    except Unserved as reason:
        return job.row(status=results.UNSERVED, note=str(reason))
    except Exception as error:  # a contender's, of any kind
        return job.row(status=results.FAILED, note=described(error))


def described(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def pairs(request: Request, place: str) -> Iterator[tuple[Case, Contender]]:
    """Every case of a place with every contender that belongs there."""
    for case in request.cases():
        if place in case.places:
            for contender in contenders.at(place, request.contenders()):
                yield case, contender


def places_of(request: Request, wanted: Iterable[str]) -> tuple[str, ...]:
    """The request's places, less those that this kind of measurement has nothing to say of."""
    return tuple(place for place in request.places() if place in set(wanted))
