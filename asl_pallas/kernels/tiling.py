"""Block shapes, from shapes, dtypes and chip: the one place that knows them."""

from __future__ import annotations

import dataclasses

LANES = 128


@dataclasses.dataclass(frozen=True)
class TpuTiling:
    rows: int
    classes: int
    group: int
    chunk: int


def round_up(n, k): return -(-n // k) * k

import os
def tpu_tiling(task, operands):
    rows, classes = operands.logits.shape
    group = 32 // min(o.dtype.itemsize for o in operands[:4] if o is not None)
    group = int(os.environ.get("GROUP", group))
    chunk = int(os.environ.get("CHUNK", 256))
    return TpuTiling(min(512, round_up(rows,128)), min(2048, round_up(classes, chunk)), group, chunk)


@dataclasses.dataclass(frozen=True)
class CpuTiling:
    rows: int
    classes: int


def cpu_tiling(rows: int, classes: int) -> CpuTiling:
    n = int(os.environ.get("CPUN", 16384))
    width = min(classes, n)
    return CpuTiling(min(rows, max(1, n // width)), width)


@dataclasses.dataclass(frozen=True)
class TritonTiling:
    rows: int
    span: int
    chunk: int
    warps: int
    stages: int


def triton_tiling(rows: int, classes: int) -> TritonTiling:
    chunk = min(1024, 1 << max(4, (classes - 1).bit_length()))
    n = max(1, 1024 // chunk)
    spans = max(1, min(-(-classes // chunk), -(-1056 * n // rows)))
    span = round_up(-(-classes // spans), chunk)
    return TritonTiling(n, span, chunk, 4, 2)
