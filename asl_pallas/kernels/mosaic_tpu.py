"""Pallas for TPU.

The grid walks blocks of rows by blocks of classes. Inside a block two loops walk groups of rows and chunks of classes,
a few vector registers at a time, so that a chunk's intermediates stay in registers. A row's partial sums stay on the
chip, lane by lane, until its last block of classes; then they leave as one lane-major vector a block of rows.

Where XLA lays the rows along the lanes, which it does unless the classes fill them, the arrays come transposed: blocks
and tiles are (classes, rows) then, a row's partial sums stay sublane by sublane, and nothing is copied to be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.bits import BITS, GROUP, PADDING, pack_tile, unpack_tile
from asl_pallas.kernels.summation import add_exactly, total_of
from asl_pallas.kernels.sums import packed_like, unpacked
from asl_pallas.kernels.tile import ENCODED, Form, Operands, Result, Task, index_where_it_varies
from asl_pallas.kernels.tiling import LANES, TPU_CONVERTED, TPU_IDS, TpuTiling, tpu_ids, tpu_refines, tpu_tiling
from asl_pallas.kernels.versions import reciprocal, result_like
from asl_pallas.losses.ops import Ops

# A group of rows and a chunk of classes of a block.
Position = tuple[Array, Array]
Stage = Callable[[Any, Operands, "Array | None"], Any]


class _Laid(NamedTuple):
    """How a block of an operand comes to a kernel, and the memory that it is rewritten to first, if it is."""

    array: Array
    spec: pl.BlockSpec
    converted: Any = None  # of the block's own extent
    spread: Any = None  # [rows, LANES]: a number per row, in each lane
    words: Any = None  # [rows, LANES], made of ids


class _Scratch(NamedTuple):
    """A kernel's own memory; None where it has no use for it."""

    converted: Operands
    spread: Operands
    words: Operands
    aside: list[Any]  # [group, chunk] or [group, partial] each, between two stages
    sums: Any = None  # `_RowSums` of [rows, partial], a row's partial sums of some blocks
    total: Any = None  # likewise, those of all blocks before
    lost: Any = None  # likewise, what the roundings of `total` lost


class _RowSums(NamedTuple):
    """What is added up along the classes."""

    losses: Any
    statistics: Any  # `Sums`, or None


def run(task: Task, operands: Operands, *, interpret: bool = False) -> Result:
    rows, classes = operands.logits.shape
    tiling = tpu_tiling(task, operands)
    grid = (pl.cdiv(rows, tiling.rows), pl.cdiv(classes, tiling.classes))
    # A vector over rows lies along the lanes: as (rows, 1) it would fill 128 lanes a row in memory.
    padded_rows = grid[0] * tiling.rows
    shape, extent = tiling.lying(rows, classes), tiling.lying(tiling.rows, tiling.classes)
    block = pl.BlockSpec(extent, lambda i, j: tiling.lying(i, j))
    by_class = pl.BlockSpec(tiling.lying(1, tiling.classes), lambda i, j: tiling.lying(jnp.int32(0), j))
    by_row = pl.BlockSpec((1, tiling.rows), lambda i, j: (jnp.int32(0), i))

    def lay(name: str, operand: Array) -> _Laid:
        if name in ENCODED and task.labels != "dense":
            return _lay_encoded(task.labels, operand, tiling)
        if operand.shape == (rows, classes):
            array = operand.T if tiling.transposed else operand
            if operand.dtype.name not in TPU_CONVERTED:
                return _Laid(array, block)
            array = array.astype(TPU_CONVERTED[operand.dtype.name])
            return _Laid(array, block, converted=pltpu.VMEM(extent, array.dtype))
        if operand.shape == (rows, 1):
            vector = jnp.pad(operand.astype(jnp.float32).reshape(1, rows), ((0, 0), (0, padded_rows - rows)))
            spread = None if tiling.transposed else pltpu.VMEM((tiling.rows, LANES), jnp.float32)
            return _Laid(vector, by_row, spread=spread)
        return _Laid((operand.T if tiling.transposed else operand).astype(jnp.float32), by_class)

    laid = operands.map(lay)
    if operands.scalars is not None:
        # Two dimensions, so that vmap's third leaves a block of whole last dimensions.
        # An index map of its own: JAX's has 64 bits where integers have, and Mosaic compiles none such.
        size = operands.scalars.size
        whole = pl.BlockSpec((1, size), lambda i, j: (jnp.int32(0),) * 2, memory_space=pltpu.SMEM)
        laid = laid._replace(scalars=_Laid(operands.scalars[None], whole))
    all_laid, structure = jax.tree.flatten(laid, is_leaf=lambda x: isinstance(x, _Laid))
    inputs, specs, converted, spread, words = (
        jax.tree.unflatten(structure, parts) for parts in zip(*all_laid, strict=True)
    )
    is_fused = [one.converted is not None for one in all_laid]

    ops = arithmetic(task, operands, not interpret and tpu_refines())
    tile = _tile_of(task, tiling, operands)
    cut = min(tiling.cut, task.cuts(tile, ops))
    packed = task.packs_counts(operands, pl.cdiv(classes, tiling.partial))
    stages = _stages(task, tiling, cut, ops, packed)
    scratch = _Scratch(converted, spread, words, _aside(stages, tile))
    row_sums = _RowSums(1, task.sums_like(operands, 1))
    result_like_logits = functools.partial(result_like, operands.logits)
    results = task.results(
        sums=result_like_logits((1, padded_rows), jnp.float32),
        elements=result_like_logits(shape, jnp.float32),
        gradient=result_like_logits(shape, operands.logits.dtype),
        statistics=jax.tree.map(lambda _: result_like_logits((1, padded_rows), jnp.float32), row_sums.statistics),
    )
    if task.value == "rows":
        kept = row_sums
        if packed:
            kept = row_sums._replace(statistics=packed_like(row_sums.statistics))
        partial = jax.tree.map(lambda _: pltpu.VMEM(tiling.lying(tiling.rows, tiling.partial), jnp.float32), kept)
        scratch = scratch._replace(sums=partial)
        if tiling.blocks_of_a_sum(classes):
            scratch = scratch._replace(total=partial, lost=partial)

    moved = jax.tree.leaves((inputs, results))
    ((value, gradient, sums),) = pl.pallas_call(
        functools.partial(_kernel, task, tiling, ops, (rows, classes), stages, packed),
        grid=grid,
        in_specs=[specs],
        out_specs=[
            task.results(
                sums=by_row,
                elements=block,
                gradient=block,
                statistics=jax.tree.map(lambda _: by_row, row_sums.statistics),
            )
        ],
        out_shape=[results],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            allow_input_fusion=tuple(is_fused) if any(is_fused) else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=60 * rows * classes,
            transcendentals=4 * rows * classes,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
        ),
        # Safe in one pass: a block is read before its own gradient is written, and no block is read twice.
        input_output_aliases={0: int(task.value is not None)} if task.gradient and task.donate_logits else {},
        interpret=interpret,
        name=task.kernel_name,
    )(inputs)
    if task.value == "rows":
        value, sums = jax.tree.map(lambda by_row: by_row[0, :rows], (value, sums))
    elif task.value is not None and tiling.transposed:
        value = value.T
    return Result(value, gradient.T if task.gradient and tiling.transposed else gradient, sums)


def _lay_encoded(form: Form, labels: Array, tiling: TpuTiling) -> _Laid:
    """Words of the block's group of classes, or all ids of its rows."""
    if form == "packed":
        spec = pl.BlockSpec((tiling.rows, LANES), lambda i, j: (i, _quotient(j, tiling.blocks_of_words)))
        return _Laid(labels, spec)
    # Rows along the lanes: as (rows, k) they would fill 128 lanes a row, and of no use in a register.
    fill = tpu_ids(labels.shape[1]) - labels.shape[1]
    ids = jnp.pad(labels, ((0, 0), (0, fill)), constant_values=PADDING).T
    spec = pl.BlockSpec((ids.shape[0], tiling.rows), lambda i, j: (jnp.int32(0), i))
    return _Laid(ids, spec, words=pltpu.VMEM((tiling.rows, LANES), jnp.int32))


def arithmetic(task: Task, operands: Operands, refines: bool) -> Ops:
    """The vector unit's max and min keep a NaN. Its reciprocal need not, and the numerator beside it does."""
    return Ops(
        reciprocal=_refined_reciprocal if refines else reciprocal,
        maximum=jnp.maximum,
        minimum=jnp.minimum,
        signed_per_element=task.needs_elements(operands),
        infer_label_from_slope=True,
        differentiable=False,
    )


def _refined_reciprocal(x: Array) -> Array:
    """The chip's estimate and a Newton step. One operation less than the compiler's own, which adds a correction."""
    estimate = reciprocal(x, approx=True)
    return estimate * (2.0 - x * estimate)


def _stages(task: Task, tiling: TpuTiling, cut: int, ops: Ops, packed: bool) -> list[Stage]:
    """Up to one of the loss's cuts and from there on, or in one for a cut of 0.

    Statistics are counted in the first stage, which has the labels, and are handed on as partial sums: it also takes a
    tile that never gets to its end.
    """

    def count(tile: Operands, valid: Array | None) -> Any:
        if not task.statistics:
            return None
        return jax.tree.map(tiling.partial_sums, task.count(tile, valid, ops, packed))

    def counted(result: Result, counts: Any) -> Result:
        return result._replace(sums=result.sums._replace(counts=counts)) if task.statistics else result

    if cut == 0:
        return [lambda carry, tile, valid: counted(task.evaluate(tile, valid, ops), count(tile, valid))]
    return [
        lambda carry, tile, valid: (task.until_cut(cut, tile, valid, ops), count(tile, valid)),
        lambda carry, tile, valid: counted(task.from_cut(cut, carry[0], tile, valid, ops), carry[1]),
    ]


def _tile_of(task: Task, tiling: TpuTiling, operands: Operands) -> Operands:
    """Shapes and dtypes of a tile, as far as a loss sees them."""

    def of(n: int, m: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(tiling.lying(n, m), dtype)

    labels = operands.labels.dtype if task.labels == "dense" else jnp.dtype("bool")
    scalars = None
    if operands.scalars is not None:
        scalars = (jax.ShapeDtypeStruct((), operands.scalars.dtype),) * operands.scalars.size
    return Operands(
        logits=of(tiling.group, tiling.chunk, operands.logits.dtype),
        labels=of(tiling.group, tiling.chunk, labels),
        where=None if operands.where is None else of(tiling.group, tiling.chunk, jnp.bool_),
        negatives=None if operands.negatives is None else of(tiling.group, tiling.chunk, labels),
        vectors=tuple(of(1, tiling.chunk, jnp.float32) for _ in operands.vectors),
        scalars=scalars,
    )


def _aside(stages: list[Stage], tile: Operands) -> list[Any]:
    """Memory for what the stages hand on, but for the last."""

    def hand_on(tile: Operands) -> list[Any]:
        carry, handed = None, []
        for stage in stages[:-1]:
            carry = stage(carry, tile, None)
            handed.append(carry)
        return handed

    return jax.tree.map(lambda a: pltpu.VMEM(a.shape, a.dtype), jax.eval_shape(hand_on, tile))


def _quotient(n: Array, k: int) -> Array:
    """n // k for n >= 0. The operator asks for a sign, whose lowering asks which chip this process has."""
    return lax.div(n, jnp.int32(k))


def _pack(ids, words, tiles: Array, pack: Callable[[Array, Array], Array]) -> None:
    """The words of the block's rows, which are made of their ids 128 rows at a time."""

    def rows(r, _):
        at = pl.ds(pl.multiple_of(r * LANES, LANES), LANES)

        def some(t, packed):
            return pack(packed, ids[pl.ds(pl.multiple_of(t * TPU_IDS, TPU_IDS), TPU_IDS), at])

        turns, none = jnp.int32(ids.shape[0] // TPU_IDS), jnp.zeros((LANES, LANES), jnp.int32)
        words[at, :] = lax.fori_loop(jnp.int32(0), turns, some, none).T

    lax.fori_loop(jnp.int32(0), tiles, rows, None)


def _kernel(
    task: Task,
    tiling: TpuTiling,
    ops: Ops,
    shape: tuple[int, int],
    stages: list[Stage],
    packed: bool,
    inputs: Operands,
    outputs: Result,
    scratch: _Scratch,
):
    """One block: of each operand [rows, classes], [1, classes] or, along the lanes, [1, rows]."""
    rows, classes = shape
    group, chunk = tiling.group, tiling.chunk
    i, j = pl.program_id(0), pl.program_id(1)
    groups = _quotient(jnp.minimum(tiling.rows, rows - i * tiling.rows) + (group - 1), group)
    if inputs.scalars is not None:
        scalars = inputs.scalars
        inputs = inputs._replace(scalars=tuple(scalars[0, n] for n in range(scalars.shape[1])))

    # The bit of the block's first 128 classes: the words are those of a group, which may have several blocks.
    first_bit = 0 if task.labels == "dense" else lax.rem(j * jnp.int32(tiling.classes // LANES), jnp.int32(BITS))
    if task.labels == "sparse":
        of_block = functools.partial(pack_tile, first=j * tiling.classes, classes=GROUP)

        def make_words(_: str, ids: Any, words: Any) -> None:
            if words is not None:
                _pack(ids, words, _quotient(groups * group + (LANES - 1), LANES), of_block)

        all_ids = inputs

        @pl.when(lax.rem(j, jnp.int32(tiling.blocks_of_words)) == 0)
        def _words():
            all_ids.map(make_words, scratch.words)

        inputs = inputs.map(lambda _, ref, words: ref if words is None else words, scratch.words)

    def convert(_: str, ref: Any, converted: Any) -> Any:
        """XLA's conversion runs where the block is read, which has to be at a fixed place."""
        if converted is None:
            return ref
        converted[...] = ref[...]
        return converted

    inputs = inputs.map(convert, scratch.converted)

    def spread(_: str, ref: Any, spread: Any) -> None:
        """Lanes to rows: every lane of a row gets the row's number."""
        if spread is not None:
            spread[...] = jnp.broadcast_to(ref[...], (LANES, tiling.rows)).T

    if jax.tree.leaves((scratch.spread, scratch.sums)):

        @pl.when(j == 0)
        def _start():
            inputs.map(spread, scratch.spread)
            for ref in jax.tree.leaves((scratch.sums, scratch.total, scratch.lost)):
                ref[...] = jnp.zeros_like(ref)

    def rows_of(g):
        return pl.ds(pl.multiple_of(g * group, group), group)

    def classes_of(c):
        return slice(None) if chunk == tiling.classes else pl.ds(pl.multiple_of(c * chunk, chunk), chunk)

    def tile_at(at: Position) -> Operands:
        g, c = at
        part = tiling.lying(rows_of(g), classes_of(c))

        def load(name: str, ref: Any, spread: Any) -> Array:
            if name in ENCODED and task.labels != "dense":
                blocks = chunk // LANES
                return unpack_tile(ref[rows_of(g), :], first_bit + c * blocks, blocks)
            if spread is not None:
                return jnp.tile(spread[rows_of(g), :], (1, chunk // LANES))
            return ref[index_where_it_varies(ref.shape, part, (slice(None), slice(None)))]

        return inputs.map(load, scratch.spread)

    def store(at: Position, result: Result) -> None:
        g, c = at
        part = tiling.lying(rows_of(g), classes_of(c))
        stored = task.results(elements=outputs.value, gradient=outputs.gradient)
        for ref, tile in zip(stored[:2], result[:2], strict=True):
            if ref is not None:
                ref[part] = tile.astype(ref.dtype)
        if task.value == "rows":
            of_rows = tiling.lying(rows_of(g), slice(None))

            def add(ref: Any, tile: Array) -> None:
                partial = tiling.partial_sums(tile)
                # Load the accumulator last: loading it first keeps it live and spills.
                ref[of_rows] = ref[of_rows] + partial

            jax.tree.map(add, scratch.sums, _RowSums(result.value, result.sums))

    def walk(first: Array, last: Array, valid: Array | None) -> None:
        """All groups of the block, and of each the chunks from the first to before the last."""

        def after(at: Position) -> Position:
            g, c = at
            ends = c + 1 == last
            # After the last tile some other comes, which never gets to the end.
            return jnp.where(ends, jnp.minimum(g + 1, groups - 1), g), jnp.where(ends, first, c + 1)

        def advance(tiles: list[Position]) -> None:
            """Takes each tile, the youngest first, through the next of its stages."""
            carries = [None, *jax.tree.map(lambda ref: ref[...], scratch.aside)]
            found = [stage(carry, tile_at(at), valid) for stage, carry, at in zip(stages, carries, tiles, strict=False)]
            if len(tiles) == len(stages):
                store(tiles[-1], found.pop())
            for refs, arrays in zip(scratch.aside, found, strict=False):
                for ref, array in zip(jax.tree.leaves(refs), jax.tree.leaves(arrays), strict=True):
                    ref[...] = array

        def in_flight(oldest: Position) -> list[Position]:
            tiles = [oldest]
            for _ in scratch.aside:
                tiles.insert(0, after(tiles[0]))
            return tiles

        def turn(_, oldest: Position) -> Position:
            advance(in_flight(oldest))
            return after(oldest)

        start = jnp.int32(0), first
        tiles = in_flight(start)
        for busy in range(1, len(stages)):
            advance(tiles[-busy:])
        lax.fori_loop(jnp.int32(0), groups * (last - first), turn, start)

    whole = _quotient(jnp.minimum(tiling.classes, classes - j * tiling.classes), chunk)

    @pl.when(whole > 0)
    def _whole():
        walk(jnp.int32(0), whole, None)

    at_the_end = j == pl.num_programs(1) - 1
    if classes % chunk:

        @pl.when(at_the_end)
        def _edge():
            of_class = lax.broadcasted_iota(jnp.int32, tiling.lying(group, chunk), tiling.classes_axis)
            walk(whole, whole + 1, of_class < classes % chunk)

    if scratch.total is not None:
        blocks = tiling.blocks_of_a_sum(classes)

        @pl.when(jnp.logical_or(lax.rem(j, jnp.int32(blocks)) == blocks - 1, at_the_end))
        def _add_to_total():
            kept = map(jax.tree.leaves, (scratch.total, scratch.lost, scratch.sums))
            for total, lost, sums in zip(*kept, strict=True):
                total[...], lost[...] = add_exactly(total[...], lost[...], sums[...])
                sums[...] = jnp.zeros_like(sums)

    if task.value == "rows":

        @pl.when(at_the_end)
        def _finish():
            def of_lane(*refs: Any) -> Array:
                return refs[0][...] if len(refs) == 1 else total_of(refs[0][...], refs[1][...])

            def of_row(sums: Array) -> Array:
                return jnp.sum(sums if tiling.transposed else sums.T, axis=0, keepdims=True)

            kept = (scratch.sums,) if scratch.total is None else (scratch.total, scratch.lost)
            lanes = jax.tree.map(of_lane, *kept)
            if packed:
                lanes = lanes._replace(statistics=unpacked(lanes.statistics))
            losses, statistics = jax.tree.map(of_row, lanes)
            outputs.value[...] = task.row_losses(losses, ops)
            if statistics is not None:
                statistics = task.row_statistics(statistics, ops, inputs)
                for ref, found in zip(jax.tree.leaves(outputs.sums), jax.tree.leaves(statistics), strict=True):
                    ref[...] = found
