"""Measured rows, the run that each comes from, and the files that keep them.

profiling/results/DEVICE/WHAT.json holds the rows of one kind of measurement on one device, or compiled for one chip.
Every row names its run, and a run has the device, the versions, the date and the command: a later, smaller run replaces
the rows that it measured and leaves the others as they were, with their own run. Times are the exception: those of one
table are all of one run, since between runs they can't be compared.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from profiling import local, targets
from profiling.cases import GRADIENT, ON_CHIP, ON_CPU, Case

SCHEMA = 1
FOLDER = pathlib.Path(__file__).resolve().parent / "results"
KINDS = ("memory", "speed", "growth", "schedule", "parity", "head")
TIMED = ("speed", "growth", "head")
# What became of a row. Only a failed one is an error.
MEASURED, FAILED, MISSING, UNSERVED, LEFT_OUT = "measured", "failed", "missing", "unserved", "left out"
STATUSES = (MEASURED, FAILED, MISSING, UNSERVED, LEFT_OUT)


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing measured.

    Attributes:
      kind: one of KINDS.
      device: the folder's name: the machine at hand, or the chip that was compiled for.
      case: the problem's name; of parity, the dtype of the logits.
      contender: the contender's name; of parity, the implementation's.
      mode: value and gradient or forward; of growth, what grows; of parity, the region.
      figures: the numbers by name: bytes, seconds, bundles.
      status, note: what became of it, and why.
      run: the key of its run.
    """

    kind: str
    device: str
    case: str
    contender: str
    mode: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    status: str = MEASURED
    note: str = ""
    run: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, self.device, self.case, self.contender, self.mode

    @property
    def table(self) -> tuple[str, ...]:
        return self.kind, self.device, self.case, self.mode

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def broken(self) -> bool:
        """Whether it was measured against a bound and found beyond it."""
        return self.figures.get("holds") is False


@dataclasses.dataclass(frozen=True)
class Run:
    """Where figures come from.

    Attributes:
      machine: what ran it; `device` of a row says what it is about.
      compiled_for: chips that were compiled for and not run on.
    """

    date: str
    command: str
    machine: str
    versions: dict[str, str]
    commit: str
    compiled_for: tuple[str, ...] = targets.TARGETS

    @property
    def key(self) -> str:
        return self.date


def this_run(arguments: Iterable[str]) -> Run:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Run(now, local.command_line(arguments), local.name(), local.versions(), local.commit())


@dataclasses.dataclass(frozen=True)
class Document:
    """The rows of one file, and their runs by key."""

    runs: dict[str, Run]
    rows: tuple[Row, ...]

    def rows_of(self, case: str, mode: str) -> dict[str, Row]:
        """The measured rows of a case by contender."""
        return {r.contender: r for r in self.rows if r.measured and (r.case, r.mode) == (case, mode)}

    def main_case(self) -> Case:
        """The case that tables and pictures are about: the chips', or the CPU's where that wasn't measured."""
        return ON_CHIP if self.rows_of(ON_CHIP.name, GRADIENT) else ON_CPU


def path_of(device: str, kind: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / device / f"{kind}.json"


def load(path: pathlib.Path) -> Document:
    """A results file. Raises ValueError, naming the file and what is wrong with it."""
    try:
        raw = json.loads(path.read_text())
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']}, expected {SCHEMA}")
        runs = {key: Run(**{**run, "compiled_for": tuple(run["compiled_for"])}) for key, run in raw["runs"].items()}
        rows = tuple(Row(**row) for row in raw["rows"])
        for row in rows:
            if row.kind not in KINDS or row.status not in STATUSES:
                raise ValueError(f"a row of kind {row.kind!r} and status {row.status!r}")
            if row.run not in runs:
                raise ValueError(f"a row of the run {row.run!r}, which isn't in the file")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no results file: {error}") from error
    return Document(runs, rows)


def load_or_empty(path: pathlib.Path) -> Document:
    return load(path) if path.exists() else Document({}, ())


def save(rows: Iterable[Row], run: Run, folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
    """Puts the rows into their files; what this run did not get to, or left out, stays as an earlier run had it.

    But not beside fresh times: a contender that isn't in this run, for want of torch say, leaves the table.
    """
    by_file: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_file.setdefault((row.device, row.kind), []).append(dataclasses.replace(row, run=run.key))
    written = []
    for (device, kind), fresh in by_file.items():
        path = path_of(device, kind, folder)
        before = load_or_empty(path)
        timed_anew = {row.table for row in fresh if row.measured and kind in TIMED}
        kept = {row.key: row for row in before.rows if row.table not in timed_anew}
        for row in fresh:
            had = kept.get(row.key)
            if row.status in (LEFT_OUT, MISSING) and had is not None and had.measured:
                continue
            kept[row.key] = row
        runs = {**before.runs, run.key: run}
        used = {row.run for row in kept.values()}
        document = {
            "schema": SCHEMA,
            "runs": {key: dataclasses.asdict(runs[key]) for key in sorted(used)},
            "rows": [dataclasses.asdict(row) for row in kept.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(_without_infinities(document), indent=1) + "\n")
        os.replace(scratch, path)
        written.append(path)
    return written


def _without_infinities(found: Any) -> Any:
    """JSON has no infinity and no NaN: None stands for them."""
    if isinstance(found, dict):
        return {key: _without_infinities(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_without_infinities(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def as_json(rows: Iterable[Row], run: Run) -> str:
    """All rows of one run, for machines."""
    document = {
        "schema": SCHEMA,
        "runs": {run.key: dataclasses.asdict(run)},
        "rows": [dataclasses.asdict(dataclasses.replace(row, run=run.key)) for row in rows],
    }
    return json.dumps(_without_infinities(document), indent=1)
