"""The bounds that the loss has to keep, measured: speed and memory here, memory and schedule of chips that aren't here.

Ratios only within one run: contenders take turns, and medians are compared, since a shared machine's timings drift.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from asl_pallas import asymmetric_loss
from profiling import cases, contenders, schedule, speed, targets

ROUNDS = 15
PEERS = {"official": "the official formula", "optax-style": "the formula in optax's style"}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Line:
    """One measured figure and its bound; `bound` is None where the figure stands for comparison."""

    where: str
    what: str
    figure: float
    unit: str
    bound: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        if self.bound is None:
            return True
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


def ours(logits: Any, labels: Any) -> Any:
    return asymmetric_loss(logits, labels).sum()


def steps() -> dict[str, Any]:
    """Value and gradient, ours first: by the implementation that a user gets without asking for one."""
    totals = {"ours": ours, **{name: contenders.find(name).build() for name in PEERS}}
    return {name: jax.value_and_grad(total) for name, total in totals.items()}


def on_the_cpu() -> Iterator[Line]:
    arrays = jax.device_put(cases.ON_CPU.arrays())
    compiled = {name: jax.jit(f).lower(*arrays).compile() for name, f in steps().items()}
    runners = {
        name: speed.Runner(name, lambda run=run: jax.block_until_ready(run(*arrays)), None)
        for name, run in compiled.items()
    }
    for _ in track(range(ROUNDS), "CPU, in turns", console=Console(stderr=True)):
        for runner in runners.values():
            runner.time()
    seconds = {name: runner.seconds for name, runner in runners.items()}
    ratios = [theirs / mine for theirs, mine in zip(seconds["official"], seconds["ours"], strict=True)]
    where = "CPU, float32 1024 x 8192"
    yield Line(where, "time of ours", 1e3 * statistics.median(seconds["ours"]), "ms")
    yield Line(where, "time of the official formula under jit", 1e3 * statistics.median(seconds["official"]), "ms")
    yield Line(
        where, "time of the formula in optax's style under jit", 1e3 * statistics.median(seconds["optax-style"]), "ms"
    )
    yield Line(where, f"official over ours, median of {ROUNDS}", statistics.median(ratios), "x", 4, True)
    yield Line(where, "temporaries of ours", targets.temporary_bytes(compiled["ours"]) / MIB, "MiB", 1)
    for name, title in PEERS.items():
        yield Line(where, f"temporaries of {title}", targets.temporary_bytes(compiled[name]) / MIB, "MiB")


def compiled_for(target: str) -> Iterator[Line]:
    where = f"{target}, bf16 4096 x 8192"
    targets.device(target)
    step, *theirs = steps().values()
    start = time.perf_counter()
    mine = targets.compile_for(target, step, *cases.ON_CHIP.shapes())
    seconds = time.perf_counter() - start
    yield Line(where, "temporaries of ours", targets.temporary_bytes(mine) / MIB, "MiB", 4)
    for f, title in zip(theirs, PEERS.values(), strict=True):
        compiled = targets.compile_for(target, f, *cases.ON_CHIP.shapes())
        yield Line(where, f"temporaries of {title}", targets.temporary_bytes(compiled) / MIB, "MiB")
    yield Line(where, "operations that read logits or labels", readers(mine), "", 2)
    yield Line(where, "compile time of ours", seconds, "s", 5)


def readers(compiled: Any) -> int:
    """How many operations of the program read its two arguments."""
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :].splitlines()
    names = [line.split(" = ")[0].strip() for line in entry if " parameter(" in line]
    return sum(line.count(f"{name},") + line.count(f"{name})") for line in entry for name in names)


def schedule_on_v5e() -> Iterator[Line]:
    where, what = "v5e, bf16 4096 x 8192", "bundles (cycles) per 1024 elements"
    of_bytes = _schedule(cases.ON_CHIP)
    yield Line(where, what, of_bytes["bundles_per_1024"], "", 12)
    yield Line(where, "registers that innermost loops spill and fill", of_bytes["spills"], "", 0)
    for form in ("packed", "sparse"):
        few = _schedule(dataclasses.replace(cases.ON_CHIP, labels=form))
        more = few["bundles_per_1024"] - of_bytes["bundles_per_1024"]
        yield Line(where, f"{what}, {form} labels over int8", more, "", 1.5)


def _schedule(case: cases.Case) -> dict[str, Any]:
    return schedule.on_tpu("v5e", case, contenders.default("v5e"), cases.GRADIENT)


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(title=f"Bounds: value and gradient, int8 labels, jax {jax.__version__}")
    for column, justify in (("where", "left"), ("what", "left"), ("figure", "right"), ("bound", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    broken = 0
    parts: list[Callable[[], Iterator[Line]]] = [on_the_cpu]
    parts += [functools.partial(compiled_for, target) for target in targets.TARGETS]
    parts.append(schedule_on_v5e)
    for part in parts:
        try:
            lines = list(part())
        except targets.MissingCompiler as reason:
            table.add_row("", str(reason), "-", "-", "not measured")
            continue
        for line in lines:
            bound = "-" if line.bound is None else f"{'>=' if line.at_least else '<='} {line.bound:g}"
            verdict = "" if line.bound is None else "holds" if line.holds else "[bold red]broken"
            table.add_row(line.where, line.what, f"{line.figure:.2f} {line.unit}".rstrip(), bound, verdict)
            broken += not line.holds
    console.print(table)
    return 1 if broken else 0
