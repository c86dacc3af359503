"""Block shapes, from shapes and dtypes: the one place that knows them.

Measured figures behind the constants. TPU, bf16 logits and int8 labels, bundles per 1024 elements in the innermost loop
and in brackets how often it spills or fills a register: value and gradient on v5e 11.4 (0) with tiles of 12 registers
and 11.1 (34) of 16; on v6e 10.6 (0) of 12, 9.5 (0) of 16, 9.9 (70) of 20 and 9.0 (220) of 64 in a single stage, on
tpu7x 10.2 (0), 9.3 (0), 10.0 (66) and 8.9 (244). The value alone on v5e 7.9 (0) of 12, 7.75 (0) of 16 and 7.9 (38) of
24. H100, the kernel of one pass, in microseconds, by elements of a tile and warps: 4096 x 9605 bf16 78 with 1024 and 4,
75 with 2048 and 8; soft labels, 4096 x 8192, 80 and 85; 64 x 2^20 128 and, with 1056 and with 2112 programs, 138 and
123. CPU, float32 1024 x 8192, the value: blocks of 24 K, 32 K, 64 K and 128 K elements take 7.5, 5.3, 4.8 and 5.4 ms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from asl_pallas.bits import GROUP
from asl_pallas.kernels.platforms import tpu_generation
from asl_pallas.kernels.tile import ENCODED, Form, Operands, Task, compute_dtype

LANES = 128
SUBLANES = 8
LARGEST_INT32 = 2**31 - 1
_TPU_REGISTER = SUBLANES * LANES

# What the TPU's vector unit has no registers for, and what XLA makes of it while the block is on its way in: by itself
# Pallas would write a copy of a bool array in 32 bits.
TPU_CONVERTED = {"bool": "int8"}

# Two buffers a block operand, and room for the scratch, in the 16 MiB that a kernel gets without asking on v5e. What
# XLA converts on the way in passes through buffers of its own; where they don't fit it writes a converted array to
# memory instead: with 6 MiB of blocks it did on v5e, with 3 MiB it didn't.
_TPU_BLOCK_BYTES = 11 * 2**20
_TPU_CONVERTED_BLOCK_BYTES = 4 * 2**20
# A block's beginning and end take some 250 cycles, and nothing hides how the first is read and the last written.
# Together they are least where a block's buffers have the geometric mean of all bytes and about this many. A copy takes
# a microsecond to start, so there is a least size too.
_TPU_BALANCED_BYTES = 3 * 2**18
_TPU_LEAST_BLOCK_BYTES = 2 * 2**20
# The loss's cut at which the first of a tile's two stages ends, and how many registers of 1024 elements a tile may
# fill. More of them spill; fewer leave a larger share idle at a turn's beginning and end, which take as long as two
# registers. On a v5 the reciprocal of 1 - m is refined, and belongs to the first stage. Soft labels have one stage.
_TPU_VALUE = 2, 16
_TPU_GRADIENT = 2, 16
_TPU_GRADIENT_REFINED = 3, 12
_TPU_SOFT = 0, 64
_TPU_IDLE_REGISTERS = 2
# Tiles of a row whose losses are added up one after the other, before their sum is one of several: that bounds the
# rounding error.
_TPU_LONGEST_SUM = 128
# A group of rows is whole in every packing: 8 rows of 32 bits, 16 of 16, 32 of 8.
_TPU_GROUP = 32
# With the rows along the lanes, the rows of a block, which are one piece of memory for 8 classes.
_TPU_TRANSPOSED_ROWS = 2048
# Below that, XLA's loop takes fewer bundles than the kernel with its blocks and outer loops: on v6e 477 for 702 with
# 64 x 600 and 1373 for 2198 with 64 x 2048; on v5e 2113 for 2366, but 4165 for 3956 with 128 x 2048.
_TPU_LEAST_ELEMENTS = 256 * 1024
# With labels that XLA would have to make bytes of first.
_TPU_LEAST_DECODED = 16 * 1024
# With half of a group's rows empty, it takes as long as XLA's loop.
_TPU_LEAST_ROWS = _TPU_GROUP // 2 + 1
# Ids that are compared at a time: the rows of a register.
TPU_IDS = 8
# With more of them in a row, 128 rows' would take more than 2 MiB of VMEM.
TPU_MOST_IDS = 4096
# Up to that, XLA's loops over the whole problem leave all they make in the cache.
_CPU_WHOLE = 64 * 1024
# Sums of a block's pieces. Fewer stay closer to the core: 1024 x 8192 took 5.0 ms in blocks of 8 rows without pieces
# and 4.1 in four, and with other work on the machine 8.9 and 4.8 in eight, in blocks of 32 rows.
_CPU_SUMS = 32 * 1024
_CPU_CLASSES = 32 * 1024
_CPU_PIECES = 8
_CPU_PIECE_CLASSES = 1024
# In microseconds, by XLA and by the kernel: 8 x 20 2.0 and 2.6, 8 x 80 2.4 and 2.6, 64 x 80 and 8 x 600 2.6, 64 x 600
# 3.8 and 2.8.
_TRITON_LEAST_ELEMENTS = 4096
# Elements of a tile, warps, and programs where there are few rows: 132 multiprocessors of an H100 with 8 or 16 each.
# The larger tile is for rows that have it, where the labels take no registers beside.
_TRITON_TILE = 1024, 4, 1056
_TRITON_WIDE_TILE = 2048, 8, 2112
# What a further chunk of a row costs, as a share of the first, by the bytes of a logit: the more there are, the longer
# the rest of a cache line has to wait. In microseconds, 2^18 x 80 bf16 in chunks of 16, 32, 64 and 128: 81, 49, 50, 58;
# float32: 112, 82, 74, 71. 2^16 x 600 bf16 in chunks of 64, 128, 256 and 1024: 109, 85, 80, 109.
_TRITON_FURTHER_CHUNK = {2: 0.06, 4: 0.27}
# 16 are for rows that have little more. 2^18 x 33 bf16 in chunks of 16, 32 and 64: 27, 38, 43.
_TRITON_LEAST_CHUNK, _TRITON_LEAST_OF_FEW, _TRITON_FEW = 32, 16, 48
# Losses that a GPU's lane adds up one after the other, before its sum is one of a span's: it bounds the rounding error.
_LONGEST_SUM = 64
_WARPGROUP = 128
MOSAIC_GPU_CLASSES = _WARPGROUP
# With 1024 elements in registers a thread has 93 of them.
_MOSAIC_GPU_TILE = 512
_MOSAIC_GPU_CHUNKS = (1024, 512, 256, 128)
# 132 multiprocessors of an H100 with eight programs each.
_MOSAIC_GPU_PROGRAMS = 1056
# Where there is more than that, chunks to each: as many as hide how a program starts, and no more, since how many
# programs are on the chip at a time depends on their registers.
_MOSAIC_GPU_STEPS = 16
_MOSAIC_GPU_STAGES = 3

# One size for all: 32 MiB of logits and as much for their gradient stay in a v5e's 128 MiB of VMEM, beside 24 MiB of
# features and their gradient; 512 classes at a time took as many bundles. On a CPU 256 rows by 512 to 4096 classes are
# equally fast.
_HEAD_BYTES = 32 * 2**20
_HEAD_CLASSES = 2048


@dataclasses.dataclass(frozen=True)
class TpuTiling:
    """A block of (rows, classes) in VMEM, walked in tiles of (group, chunk) in registers."""

    rows: int
    classes: int
    group: int
    chunk: int
    transposed: bool = False  # rows along the lanes, classes along the sublanes
    cut: int = 0  # of the loss, at which the first of two stages ends; 0 for one stage

    def lying(self, of_rows: Any, of_classes: Any) -> tuple[Any, Any]:
        """Something of the rows and something of the classes, in the order in which their dimensions lie."""
        return (of_classes, of_rows) if self.transposed else (of_rows, of_classes)

    @property
    def classes_axis(self) -> int:
        return 0 if self.transposed else 1

    @property
    def blocks_of_words(self) -> int:
        """How many blocks of classes share a group of words; unless they divide it there is one in all."""
        return GROUP // self.classes if GROUP % self.classes == 0 else 1

    def blocks_of_a_sum(self, classes: int) -> int:
        """How many blocks of classes add up their losses one after the other; 0 for all there are.

        Longer sums are made of shorter ones, which are added without an error. That takes 0.4 bundles per 1024
        elements of a block on v5e, where all blocks did it.
        """
        if math.ceil(classes / self.chunk) <= _TPU_LONGEST_SUM:
            return 0
        return max(1, _TPU_LONGEST_SUM * self.chunk // self.classes)

    @property
    def partial(self) -> int:
        """How many sums a row has until its end, as many as a register has places along the classes."""
        return SUBLANES if self.transposed else LANES

    def partial_sums(self, tile: Any) -> Any:
        """Of a tile, or what they are already."""
        width = tile.shape[self.classes_axis]
        first, *others = (
            tile[self.lying(slice(None), slice(k, k + self.partial))] for k in range(0, width, self.partial)
        )
        return sum(others, start=first)


def tpu_refines() -> bool:
    """Whether the TPU's estimate of a reciprocal needs a Newton step: before v6e, and where the chip isn't known."""
    return (tpu_generation() or 0) < 6


def tpu_pays(rows: int, classes: int, labels: Form) -> bool:
    """Whether the kernel is worth its start: XLA's loop is faster on few registers, or where most rows are empty."""
    if labels != "dense":
        return rows * classes >= _TPU_LEAST_DECODED
    filled = rows >= _TPU_LEAST_ROWS or tpu_transposed(rows, classes)
    return filled and rows * classes >= _TPU_LEAST_ELEMENTS


def tpu_transposed(rows: int, classes: int) -> bool:
    """Whether XLA itself would lay the rows along the lanes, since that fills fewer registers; it keeps to this rule.

    An array that is laid out the other way is copied, there and back, before a kernel reads it.
    """
    return _padded(classes, rows) < _padded(rows, classes)


def _padded(sublanes: int, lanes: int) -> int:
    return _round_up(sublanes, SUBLANES) * _round_up(lanes, LANES)


def tpu_tiling(task: Task, operands: Operands) -> TpuTiling:
    rows, classes = operands.logits.shape
    full = [
        operand
        for name, operand in operands.arrays()
        if operand.shape == (rows, classes) and (name not in ENCODED or task.labels == "dense")
    ]
    element_bytes = sum(operand.dtype.itemsize for operand in full)
    if task.gradient:
        element_bytes += operands.logits.dtype.itemsize
    converted = sum(operand.dtype.name in TPU_CONVERTED for operand in full)
    element_bytes += 5 * converted  # buffers of XLA's, and a scratch
    if task.value == "elements":
        element_bytes += compute_dtype(operands.logits.dtype).itemsize
    if task.is_soft(operands.labels.dtype):
        cut, registers = _TPU_SOFT
    elif task.gradient:
        cut, registers = _TPU_GRADIENT_REFINED if tpu_refines() else _TPU_GRADIENT
    else:
        cut, registers = _TPU_VALUE
    transposed = task.labels == "dense" and tpu_transposed(rows, classes)
    balanced = math.isqrt(rows * classes * element_bytes * _TPU_BALANCED_BYTES)
    largest = _TPU_CONVERTED_BLOCK_BYTES if converted else _TPU_BLOCK_BYTES
    block_bytes = min(max(balanced, _TPU_LEAST_BLOCK_BYTES), largest)
    most = block_bytes // (2 * element_bytes)  # elements of a block
    tiles = _tpu_transposed_tiles(classes, registers) if transposed else _tpu_tiles(registers, task)
    tiles = [(group, chunk) for group, chunk in tiles if _rows_of_block(group) * chunk <= most]
    group, chunk = _cheapest(rows, classes, registers, tiles)
    least = _rows_of_block(group)
    if transposed:
        block_rows = max(min(_round_up(rows, least), _TPU_TRANSPOSED_ROWS // least * least), least)
        block_classes = min(_round_up(classes, chunk), max(most // block_rows // chunk * chunk, chunk))
        block_rows = min(_round_up(rows, least), max(most // block_classes // least * least, least))
        return TpuTiling(block_rows, block_classes, group, chunk, True, cut)
    # Rows that aren't there take room, but no time to copy.
    block_bytes = min(block_bytes * least // min(rows, least), largest)
    most = block_bytes // (2 * element_bytes)
    block_classes = most // least if task.labels == "dense" else min(most // least, GROUP)
    block_classes = max(block_classes // chunk * chunk, chunk)
    block_classes = _round_up(math.ceil(classes / math.ceil(classes / block_classes)), chunk)
    if task.labels != "dense" and block_classes < classes:
        # The words of a block are those of one group, whole.
        block_classes = 1 << (block_classes.bit_length() - 1)
    row_bytes = 2 * element_bytes * block_classes
    if task.labels == "packed":
        row_bytes += 2 * LANES * 4 * (1 + (operands.negatives is not None))  # a group's words
    if task.labels == "sparse":
        for ids in filter(lambda ids: ids is not None, (operands.labels, operands.negatives)):
            row_bytes += 2 * tpu_ids(ids.shape[1]) * 4 + LANES * 4  # the ids, and room for the words
    block_rows = max(block_bytes // row_bytes // least * least, least)
    return TpuTiling(min(block_rows, _round_up(rows, least)), block_classes, group, chunk, False, cut)


def _rows_of_block(group: int) -> int:
    """The fewest: a block has vectors over its rows, along the lanes."""
    return math.lcm(group, LANES)


def _tpu_tiles(registers: int, task: Task) -> list[tuple[int, int]]:
    chunks = [LANES * n for n in range(1, registers + 1)]
    if task.labels != "dense":
        chunks = [chunk for chunk in chunks if GROUP % chunk == 0]  # of a group of words none is left over
    # Each of a group's sums is loaded and stored once a tile: of statistics there are so many that few groups pay.
    most = _TPU_GROUP if task.statistics else SUBLANES * registers
    return [(group, chunk) for chunk in chunks for group in range(_TPU_GROUP, most + 1, _TPU_GROUP)]


def _tpu_transposed_tiles(classes: int, registers: int) -> list[tuple[int, int]]:
    chunks = [_TPU_GROUP * n for n in range(1, registers + 1)]
    chunks.append(min(_round_up(classes, SUBLANES), SUBLANES * registers))
    return [(LANES * n, chunk) for chunk in chunks for n in range(1, registers + 1)]


def _cheapest(rows: int, classes: int, registers: int, tiles: list[tuple[int, int]]) -> tuple[int, int]:
    """Of the tiles that fit the registers, the one that leaves least idle, beyond the array and between turns."""

    def cost(tile: tuple[int, int]) -> tuple[float, int]:
        group, chunk = tile
        turns = math.ceil(rows / group) * math.ceil(classes / chunk)
        return turns * (group * chunk / _TPU_REGISTER + _TPU_IDLE_REGISTERS), -chunk

    return min((tile for tile in tiles if math.prod(tile) <= registers * _TPU_REGISTER), key=cost)


def tpu_ids(k: int) -> int:
    """How many ids a row has once it is filled up."""
    return max(_round_up(k, TPU_IDS), TPU_IDS)


def triton_pays(rows: int, classes: int, labels: Form) -> bool:
    """Whether the kernel is no slower than what XLA makes of a small problem, in one kernel less."""
    return labels != "dense" or rows * classes >= _TRITON_LEAST_ELEMENTS


@dataclasses.dataclass(frozen=True)
class TritonTiling:
    """A program's rows and span of classes, walked in tiles of (rows, chunk)."""

    rows: int
    span: int
    chunk: int
    warps: int
    stages: int


def triton_tiling(rows: int, classes: int, logits_bytes: int, plain: bool) -> TritonTiling:
    """For rows of that width; `plain` ones have hard labels, an element each."""
    wide = plain and classes >= _TRITON_WIDE_TILE[0]
    elements, warps, least_programs = _TRITON_WIDE_TILE if wide else _TRITON_TILE
    least = _TRITON_LEAST_OF_FEW if classes <= _TRITON_FEW else _TRITON_LEAST_CHUNK
    further = _TRITON_FURTHER_CHUNK[logits_bytes]

    def cost(chunk: int) -> tuple[float, int]:
        chunks = math.ceil(classes / chunk)
        return chunks * chunk * (1 + further * (chunks - 1)), -chunk

    chunk = min((least << n for n in range((elements // least).bit_length())), key=cost)
    block_rows = elements // chunk
    programs = math.ceil(rows / block_rows)
    chunks = math.ceil(classes / chunk)
    spans = max(min(chunks, math.ceil(least_programs / programs)), math.ceil(chunks / _LONGEST_SUM))
    span = _round_up(math.ceil(classes / spans), chunk)
    return TritonTiling(block_rows, span, chunk, warps, stages=2)


@dataclasses.dataclass(frozen=True)
class MosaicGpuTiling:
    """Programs, a warpgroup each, that share out the rows' spans of classes; a span is walked in `steps` chunks."""

    programs: int
    spans: int
    steps: int
    chunk: int  # what the copy engine brings
    tile: int  # what is in registers
    vector: int  # neighbouring elements in a thread's registers
    stages: int


def mosaic_gpu_tiling(rows: int, classes: int, logits_bytes: int, vectors: bool) -> MosaicGpuTiling:
    """For rows of at least `MOSAIC_GPU_CLASSES`; with `vectors`, a thread's elements make 16 bytes where they can."""
    chunk = min((c for c in _MOSAIC_GPU_CHUNKS if c <= classes), key=lambda c: (_round_up(classes, c), -c))
    chunks = math.ceil(classes / chunk)
    tile = min(chunk, _MOSAIC_GPU_TILE)
    steps = math.ceil(chunks / min(chunks, math.ceil(_MOSAIC_GPU_PROGRAMS / rows)))
    steps = min(steps, _LONGEST_SUM * tile // chunk)
    spans = math.ceil(chunks / steps)
    vector = min(tile // _WARPGROUP, 16 // logits_bytes) if vectors else 1
    programs = min(rows * spans, max(_MOSAIC_GPU_PROGRAMS, rows * spans * steps // _MOSAIC_GPU_STEPS))
    return MosaicGpuTiling(programs, spans, steps, chunk, tile, vector, _MOSAIC_GPU_STAGES)


@dataclasses.dataclass(frozen=True)
class CpuTiling:
    """A block whose losses stay in the cache until they are added up.

    It is cut along the classes into pieces, which are added while they are computed: an eighth to write and read again.
    """

    rows: int
    classes: int
    pieces: int


def cpu_tiling(rows: int, classes: int) -> CpuTiling | None:
    """None for the whole problem at once."""
    if rows * classes <= _CPU_WHOLE:
        return None
    block_classes = min(classes, _CPU_CLASSES)
    pieces = max(1, min(_CPU_PIECES, block_classes // _CPU_PIECE_CLASSES))
    return CpuTiling(min(rows, _CPU_SUMS * pieces // block_classes), block_classes, pieces)


def head_chunk(rows: int, classes: int) -> int:
    """Classes of a linear head at a time: logits and gradient in float32 are what has to fit."""
    chunk = _HEAD_CLASSES
    while isinstance(rows, int) and chunk > LANES and 4 * rows * chunk > _HEAD_BYTES:
        chunk //= 2
    return min(chunk, max(1, classes))


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
