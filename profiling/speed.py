"""Speed on the device at hand: contenders take turns, medians are compared, and ratios are taken within a round.

A shared machine's clock drifts, so nothing is compared across runs. An untimed call goes before each timed one: a train
loop calls its step again and again, and a contender should not pay for returning the pages that the one before it had
asked for. What is too short for the clock is called several times in a row. On an accelerator these calls are in flight
together, as a train loop's steps are, and the clock stops when the last one has ended; beside that stands what the
chip's own kernels take of it.

In place, the logits are donated: a copy of them is made before the clock starts, and nothing is freed before it stops.
torch's autograd writes no gradient over its logits, so its losses are timed as ever.

The yardstick is a copy in the same turns: x + 1 of the logits under jit, one array read and one written, fresh
like a contender's gradient. The floor of a step is the bytes that it can't do without at the copy's rate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from profiling import cases, contenders, on_chip, results, torch_peers
from profiling.cases import CPU, FORWARD, GPU, GRADIENT, IN_PLACE, MODES, Case
from profiling.contenders import Contender, Unserved
from profiling.results import Row
from profiling.session import Session, described, device_of

ROUNDS, QUICK_ROUNDS, GROWTH_ROUNDS = 15, 9, 7
# Seconds that one timing takes at least; with calls in flight it has to hide how the first one starts.
SHORTEST, SHORTEST_IN_FLIGHT = 2e-3, 10e-3
COPY = "copy"
CONFIDENCE = 0.95
_TOO_SLOW = "torch.compile takes ten seconds for each size"


@dataclasses.dataclass
class Runner:
    """A contender made ready: a call, how long its compilation took, and its timings.

    What a call gives up is made anew for each, before the clock starts. `finish` waits for what the last call returned;
    None where each waits for its own end.
    """

    contender: str
    call: Callable[..., Any]
    compile_seconds: float | None
    given_up: Callable[[], Any] | None = None
    finish: Callable[[Any], Any] | None = None
    calls: int = 1
    on_chip: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    def warm_up(self) -> None:
        self.run([self.arguments()])
        given = [self.arguments()]
        start = time.perf_counter()
        self.run(given)
        shortest = SHORTEST if self.finish is None else SHORTEST_IN_FLIGHT
        self.calls = max(1, min(1000, math.ceil(shortest / max(time.perf_counter() - start, 1e-7))))

    def arguments(self) -> tuple[Any, ...]:
        return () if self.given_up is None else (self.given_up(),)

    def run(self, given: Sequence[tuple[Any, ...]]) -> Any:
        """The last call's result, if it isn't given back at once."""
        found: Any = None
        for arguments in given:
            found = self.call(*arguments)
            if self.finish is None and not arguments:
                found = None  # its memory goes back, as in a train loop
        if self.finish is not None:
            self.finish(found)
        return found

    def time(self) -> None:
        self.run([self.arguments()])
        given = [self.arguments() for _ in range(self.calls)]
        start = time.perf_counter()
        last = self.run(given)
        self.seconds.append((time.perf_counter() - start) / self.calls)
        del last  # now, and not while the clock ran

    def profile(self) -> None:
        self.on_chip = on_chip.seconds(lambda steps: self.run([self.arguments() for _ in range(steps)]))


def prepare(contender: Contender, case: Case, mode: str, arrays: tuple[Any, Any], backend: str) -> Runner:
    """Compiles; the time that takes is measured from the function to the program, tracing included."""
    start = time.perf_counter()
    if contender.torch:
        operands = torch_peers.tensors(arrays, cuda=backend == GPU)
        call = torch_peers.step(contender.build(), operands, mode != FORWARD)
        finish = torch_peers.wait if backend == GPU else None
        start = time.perf_counter()
        call()  # torch.compile compiles at the first call
        seconds = time.perf_counter() - start if contender.compiled_by_torch else None
        return Runner(contender.name, call, seconds, finish=finish)
    logits, labels = jax.device_put(arrays)
    step = contenders.step(contender.build(), mode)
    return _jitted(contender.name, step, mode, backend, start, logits, labels)


def prepare_copy(arrays: tuple[Any, Any], mode: str, backend: str) -> Runner:
    return _jitted(COPY, lambda x: x + 1, mode, backend, time.perf_counter(), jax.device_put(arrays[0]))


def _jitted(
    name: str, step: Callable[..., Any], mode: str, backend: str, start: float, logits: Any, *others: Any
) -> Runner:
    donated = mode == IN_PLACE
    compiled = jax.jit(step, donate_argnums=0 if donated else ()).lower(logits, *others).compile()
    seconds = time.perf_counter() - start

    def call(*fresh: Any) -> Any:
        found = compiled(*(fresh or (logits,)), *others)
        return jax.block_until_ready(found) if backend == CPU else found

    return Runner(
        name,
        call,
        seconds,
        given_up=(lambda: jax.block_until_ready(jnp.array(logits, copy=True))) if donated else None,
        finish=None if backend == CPU else jax.block_until_ready,
    )


def measure(session: Session) -> None:
    """The main cases in all modes, how time grows with batch and classes, and the other cases."""
    request = session.request
    backend = request.backend
    if backend not in request.places():
        return
    rounds = QUICK_ROUNDS if request.quick else ROUNDS
    mine = [case for case in request.cases() if backend in case.places]
    for case in filter(request.whole, mine):
        modes = (GRADIENT,) if request.quick else MODES
        # On a chip it takes donate_logits, and the kernel moves as many bytes.
        for mode in (*modes, IN_PLACE) if backend == CPU else modes:
            if not session.cut_short:
                session.rows += in_turns(session, case, mode, rounds)
    if request.case is None and not session.cut_short:
        grow(session)
    for case in itertools.filterfalse(request.whole, mine):
        if not session.cut_short:
            session.rows += in_turns(session, case, GRADIENT, rounds)


def in_turns(session: Session, case: Case, mode: str, rounds: int, kind: str = "speed") -> list[Row]:
    """The rows of one case; after Ctrl-C those of the rounds so far."""
    backend = session.request.backend
    chosen = session.request.with_ours(backend)
    rows: list[Row] = []
    runners: list[Runner] = []
    place = device_of(backend)
    arrays = case.arrays()
    with session.progress() as progress:
        task = progress.add_task("", total=len(chosen) + rounds)
        try:
            copy = prepare_copy(arrays, mode, backend)
            for contender in chosen:
                progress.update(task, description=f"{kind}: {case.name} {mode}, compiling {contender.name}")
                try:
                    missing = contender.missing(backend)
                    if missing:
                        rows.append(Row(kind, place, case.name, contender.name, mode, {}, results.MISSING, missing))
                        continue
                    if kind == "growth" and contender.compiled_by_torch:
                        rows.append(Row(kind, place, case.name, contender.name, mode, {}, results.LEFT_OUT, _TOO_SLOW))
                        continue
                    contender.check(case)
                    runner = prepare(contender, case, mode, arrays, backend)
                    runner.warm_up()
                    runners.append(runner)
                except Unserved as reason:
                    rows.append(Row(kind, place, case.name, contender.name, mode, {}, results.UNSERVED, str(reason)))
                except Exception as error:  # a contender's, of any kind
                    rows.append(Row(kind, place, case.name, contender.name, mode, {}, results.FAILED, described(error)))
                progress.advance(task)
            copy.warm_up()
            for k in range(rounds):
                progress.update(task, description=f"{kind}: {case.name} {mode}, round {k + 1} of {rounds}")
                for runner in (copy, *runners):
                    if not runner.error:
                        try:
                            runner.time()
                        except Exception as error:  # the same
                            runner.error = described(error)
                progress.advance(task)
            if backend != CPU and kind == "speed":
                progress.update(task, description=f"{kind}: {case.name} {mode}, profiling")
                for runner in (copy, *runners):
                    if not runner.error:
                        # Where the profiler may not be used the clock has to do.
                        with contextlib.suppress(Exception):
                            runner.profile()
        except KeyboardInterrupt:
            session.cut_short = True
    ours = contenders.default(backend).name
    of_ours = next((runner.seconds for runner in runners if runner.contender == ours), [])
    for runner in runners:
        if runner.error:
            rows.append(Row(kind, place, case.name, runner.contender, mode, {}, results.FAILED, runner.error))
        elif runner.seconds:
            figures = summarise(runner, of_ours, copy, case, mode)
            rows.append(Row(kind, place, case.name, runner.contender, mode, figures))
    return rows


def summarise(runner: Runner, ours: Sequence[float], copy: Runner, case: Case, mode: str) -> dict[str, Any]:
    """Median and quartiles of the time, the ratio to ours with its interval, and the fraction of the copy's rate."""
    pairs = list(zip(runner.seconds, ours, strict=False))
    ratios = [theirs / mine for theirs, mine in pairs]
    low, high = interval(ratios)
    copied = 2 * case.elements * jnp.dtype(case.logits).itemsize
    bandwidth = copied / statistics.median(copy.seconds)
    floor = case.floor_of(mode) / bandwidth
    quartiles = statistics.quantiles(runner.seconds, n=4) if len(runner.seconds) > 1 else [runner.seconds[0]] * 3
    by_chip = {}
    if runner.on_chip is not None and copy.on_chip is not None:
        by_chip = {
            "seconds_on_chip": runner.on_chip,
            "fraction_of_floor_on_chip": case.floor_of(mode) / copied * copy.on_chip / runner.on_chip,
            "copy_bytes_per_second_on_chip": copied / copy.on_chip,
        }
    return {
        "rounds": len(runner.seconds),
        "seconds": statistics.median(runner.seconds),
        "seconds_quartiles": [quartiles[0], quartiles[2]],
        "ratio_to_ours": statistics.median(ratios) if ratios else None,
        "ratio_interval": [low, high],
        "copy_bytes_per_second": bandwidth,
        "fraction_of_floor": floor / statistics.median(runner.seconds),
        "compile_seconds": runner.compile_seconds,
        **by_chip,
    }


def interval(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """A 95 % interval for the median, from the order of the samples alone; None where they are too few."""
    if len(samples) < 2:
        return None, None
    found = scipy.stats.quantile_test(list(samples), p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def grow(session: Session) -> None:
    """How time grows while one side of the matrix doubles: the slope of log time over log size, 1 if linear."""
    backend = session.request.backend
    chosen = session.request.with_ours(backend)
    for side, shapes in cases.GROWTH.items():
        points: dict[str, list[tuple[int, float]]] = {contender.name: [] for contender in chosen}
        notes: dict[str, Row] = {}
        for shape in shapes:
            case = Case(shape, "float32", "int8", (backend,))
            for row in in_turns(session, case, GRADIENT, GROWTH_ROUNDS, kind="growth"):
                if row.measured:
                    size = shape[0] if side == "batch" else shape[1]
                    points[row.contender].append((size, row.figures["seconds"]))
                else:
                    notes.setdefault(row.contender, row)
            if session.cut_short:
                break
        session.rows += [grown(device_of(backend), side, name, points[name], notes) for name in points]
        if session.cut_short:
            return


def grown(device: str, side: str, name: str, points: list[tuple[int, float]], notes: dict[str, Row]) -> Row:
    """The row of one contender and one side: times by size, and the slope."""
    if name in notes:
        return Row("growth", device, side, name, GRADIENT, {}, notes[name].status, notes[name].note)
    if not points:
        return Row("growth", device, side, name, GRADIENT, {}, results.MISSING, "cut short before the first size")
    sizes, seconds = zip(*points, strict=True)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(points) > 1 else None
    figures = {"sizes": list(sizes), "seconds": list(seconds), "slope": slope, "other_side": cases.GROWTH_FIXED[side]}
    return Row("growth", device, side, name, GRADIENT, figures)
