"""Pallas for TPU.

The grid walks blocks of rows by blocks of classes. Inside a block two loops walk groups of rows and chunks of classes,
a few vector registers at a time, so that a chunk's intermediates stay in registers. A row's partial sums stay on the
chip, lane by lane, until its last block of classes; then they leave as one lane-major vector a block of rows.

Where XLA lays the rows along the lanes, which it does unless the classes fill them, the arrays come turned: blocks and
tiles are (classes, rows) then, a row's partial sums stay sublane by sublane, and nothing is copied to be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.bits import BITS, GROUP, PADDING, pack_tile, unpack_tile
from asl_pallas.kernels.summation import add_exactly, total_of
from asl_pallas.kernels.tile import Form, Operands, Result, Task
from asl_pallas.kernels.tiling import LANES, TPU_CONVERTED, TPU_IDS, TpuTiling, tpu_ids, tpu_refines, tpu_tiling
from asl_pallas.kernels.versions import reciprocal, result_like
from asl_pallas.losses.base import Ops

# Scratch: a row's partial sums of some blocks, those of all blocks before, and what the latter's roundings lost.
_SUMS = ("sums", "total", "lost")
# A group of rows and a chunk of classes of a block.
Position = tuple[Array, Array]
Stage = Callable[[Any, Operands, "Array | None"], Any]


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

    inputs: dict[str, tuple[Array, pl.BlockSpec]] = {}
    scratch: dict[str, Any] = {}
    converted: list[bool] = []
    for name, operand in operands._asdict().items():
        if operand is None:
            continue
        if name == "labels" and task.labels != "dense":
            inputs[name], scratch_words = _few_labels(task.labels, operand, tiling)
            scratch.update(scratch_words)
            converted.append(False)
            continue
        whole = operand.shape == (rows, classes)
        fused = whole and operand.dtype.name in TPU_CONVERTED
        array = operand.T if tiling.turned and name != "scalars" else operand
        if name == "scalars":
            # Two dimensions, so that vmap's third leaves a block of whole last dimensions.
            # An index map of its own: JAX's has 64 bits where integers have, and Mosaic compiles none such.
            whole_array = pl.BlockSpec((1, operand.size), lambda i, j: (jnp.int32(0),) * 2, memory_space=pltpu.SMEM)
            inputs[name] = operand[None], whole_array
        elif fused:
            inputs[name] = array.astype(TPU_CONVERTED[operand.dtype.name]), block
            scratch[name] = pltpu.VMEM(extent, inputs[name][0].dtype)
        elif whole:
            inputs[name] = array, block
        elif operand.shape == (rows, 1):
            vector = operand.astype(jnp.float32).reshape(1, rows)
            inputs[name] = jnp.pad(vector, ((0, 0), (0, padded_rows - rows))), by_row
            if not tiling.turned:
                scratch[name] = pltpu.VMEM((tiling.rows, LANES), jnp.float32)
        else:
            inputs[name] = array.astype(jnp.float32), by_class
        converted.append(fused)

    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
    if task.value == "rows":
        outputs["value"] = result_like(operands.logits, (1, padded_rows), jnp.float32), by_row
        partial = pltpu.VMEM(tiling.lying(tiling.rows, tiling.partial), jnp.float32)
        scratch.update(dict.fromkeys(_SUMS if tiling.blocks_of_a_sum(classes) else _SUMS[:1], partial))
    elif task.value == "elements":
        outputs["value"] = result_like(operands.logits, shape, jnp.float32), block
    if task.gradient:
        outputs["gradient"] = result_like(operands.logits, shape, operands.logits.dtype), block

    ops = arithmetic(task, operands, not interpret and tpu_refines())
    aside = _aside(task, tiling, operands, ops)
    kernel = functools.partial(
        _kernel,
        task,
        tiling,
        ops,
        (rows, classes),
        _tile_of(task, tiling, operands),
        tuple(inputs),
        tuple(outputs),
    )
    arrays: list[Any] = [array for array, _ in inputs.values()]
    shapes: list[Any] = [shape for shape, _ in outputs.values()]
    found = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=shapes,
        scratch_shapes=[scratch, aside],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            allow_input_fusion=tuple(converted) if any(converted) else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=60 * rows * classes,
            transcendentals=4 * rows * classes,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *shapes)),
        ),
        # Safe in one pass: a block is read before its own gradient is written, and no block is read twice.
        input_output_aliases={0: list(outputs).index("gradient")} if task.gradient and task.donate_logits else {},
        interpret=interpret,
        name="asl_pallas_" + "_and_".join(outputs),
    )(*arrays)
    result = dict(zip(outputs, found, strict=True))
    for name in result:
        if name == "value" and task.value == "rows":
            result[name] = result[name][0, :rows]
        elif tiling.turned:
            result[name] = result[name].T
    return Result(result.get("value"), result.get("gradient"))


def _few_labels(form: Form, labels: Array, tiling: TpuTiling) -> tuple[tuple[Array, pl.BlockSpec], dict[str, Any]]:
    """Words of the block's group of classes, or all ids of its rows and room for the words to be made of them."""
    if form == "packed":
        spec = pl.BlockSpec((tiling.rows, LANES), lambda i, j: (i, _quotient(j, tiling.blocks_of_words)))
        return (labels, spec), {}
    # Rows along the lanes: as (rows, k) they would fill 128 lanes a row, and of no use in a register.
    fill = tpu_ids(labels.shape[1]) - labels.shape[1]
    ids = jnp.pad(labels, ((0, 0), (0, fill)), constant_values=PADDING).T
    spec = pl.BlockSpec((ids.shape[0], tiling.rows), lambda i, j: (jnp.int32(0), i))
    return (ids, spec), {"words": pltpu.VMEM((tiling.rows, LANES), jnp.int32)}


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


def _stages(task: Task, tiling: TpuTiling, tile: Operands, ops: Ops) -> list[Stage]:
    """Up to one of the loss's cuts and from there on, or in one where it has none."""
    cut = min(tiling.cut, task.cuts(tile, ops))
    if cut == 0:
        return [lambda carry, tile, valid: task.evaluate(tile, valid, ops)]
    return [
        lambda carry, tile, valid: task.until_cut(cut, tile, valid, ops),
        lambda carry, tile, valid: task.from_cut(cut, carry, tile, valid, ops),
    ]


def _tile_of(task: Task, tiling: TpuTiling, operands: Operands) -> Operands:
    """Shape and dtype of a tile's logits and labels."""
    labels = operands.labels.dtype if task.labels == "dense" else jnp.dtype("bool")
    extent = tiling.lying(tiling.group, tiling.chunk)
    shapes: list[Any] = [jax.ShapeDtypeStruct(extent, dtype) for dtype in (operands.logits.dtype, labels)]
    return Operands(*shapes)


def _aside(task: Task, tiling: TpuTiling, operands: Operands, ops: Ops) -> list[list[Any]]:
    """Memory for what the stages hand on, but for the last."""
    tile = _tile_of(task, tiling, operands)

    def hand_on(tile: Operands, scalars: Array | None) -> list[Any]:
        carry, handed = (), []
        for stage in _stages(task.bind(scalars), tiling, tile, ops)[:-1]:
            carry = stage(carry, tile, None)
            handed.append(carry)
        return handed

    return jax.tree.map(lambda a: pltpu.VMEM(a.shape, a.dtype), jax.eval_shape(hand_on, tile, operands.scalars))


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
    task: Task, tiling: TpuTiling, ops: Ops, shape: tuple[int, int], tile_shape: Operands, names, output_names, *refs
):
    """One block. The refs are the inputs and the outputs, in the order of their names, and the scratch."""
    inputs = dict(zip(names, refs, strict=False))
    outputs = dict(zip(output_names, refs[len(names) :], strict=False))
    scratch, aside = refs[-2:]
    rows, classes = shape
    group, chunk = tiling.group, tiling.chunk
    i, j = pl.program_id(0), pl.program_id(1)
    groups = _quotient(jnp.minimum(tiling.rows, rows - i * tiling.rows) + (group - 1), group)
    if "scalars" in inputs:
        scalars = inputs.pop("scalars")
        task = task.bind(scalars[0, k] for k in range(scalars.shape[1]))
    stages = _stages(task, tiling, tile_shape, ops)

    # The bit of the block's first 128 classes: the words are those of a group, which may have several blocks.
    first_bit = 0 if task.labels == "dense" else lax.rem(j * jnp.int32(tiling.classes // LANES), jnp.int32(BITS))
    words = scratch.pop("words", None)
    if words is not None:
        ids, inputs["labels"] = inputs["labels"], words

        @pl.when(lax.rem(j, jnp.int32(tiling.blocks_of_words)) == 0)
        def _words():
            tiles = _quotient(groups * group + (LANES - 1), LANES)
            _pack(ids, words, tiles, functools.partial(pack_tile, first=j * tiling.classes, classes=GROUP))

    for name in [n for n in scratch if n not in _SUMS and inputs[n].shape[0] > 1]:
        # XLA's conversion runs where the block is read, which has to be at a fixed place.
        converted = scratch.pop(name)
        converted[...] = inputs[name][...]
        inputs[name] = converted

    if scratch:

        @pl.when(j == 0)
        def _start():
            for name, ref in scratch.items():
                if name in _SUMS:
                    ref[...] = jnp.zeros_like(ref)
                else:  # lanes to rows: every lane of a row gets the row's number
                    ref[...] = jnp.broadcast_to(inputs[name][...], (LANES, tiling.rows)).T

    def rows_of(g):
        return pl.ds(pl.multiple_of(g * group, group), group)

    def classes_of(c):
        return slice(None) if chunk == tiling.classes else pl.ds(pl.multiple_of(c * chunk, chunk), chunk)

    def load(name: str, at: tuple[Any, Any]) -> Array:
        if name in scratch:
            return jnp.tile(scratch[name][at[0], :], (1, chunk // LANES))
        ref = inputs[name]
        return ref[tuple(part if n > 1 else slice(None) for part, n in zip(at, ref.shape, strict=True))]

    def tile_at(at: Position) -> Operands:
        g, c = at
        part = tiling.lying(rows_of(g), classes_of(c))
        tile = {name: load(name, part) for name in inputs if name != "labels" or task.labels == "dense"}
        if task.labels != "dense":
            blocks = chunk // LANES
            tile["labels"] = unpack_tile(inputs["labels"][rows_of(g), :], first_bit + c * blocks, blocks)
        return Operands(**tile)

    def store(at: Position, result: Result) -> None:
        g, c = at
        part = tiling.lying(rows_of(g), classes_of(c))
        if task.gradient:
            outputs["gradient"][part] = result.gradient.astype(outputs["gradient"].dtype)
        if task.value == "elements":
            outputs["value"][part] = result.value
        if task.value == "rows":
            of_rows = tiling.lying(rows_of(g), slice(None))
            parts = (tiling.lying(slice(None), slice(k, k + tiling.partial)) for k in range(0, chunk, tiling.partial))
            first, *others = (result.value[part] for part in parts)
            # To be read at the end: what a tile's sum began with would be in a register from the tile's beginning on.
            scratch["sums"][of_rows] = scratch["sums"][of_rows] + sum(others, start=first)

    def walk(first: Array, last: Array, valid: Array | None) -> None:
        """All groups of the block, and of each the chunks from the first to before the last."""

        def after(at: Position) -> Position:
            g, c = at
            ends = c + 1 == last
            # After the last tile some other comes, which never gets to the end.
            return jnp.where(ends, jnp.minimum(g + 1, groups - 1), g), jnp.where(ends, first, c + 1)

        def advance(tiles: list[Position]) -> None:
            """Takes each tile, the youngest first, through the next of its stages."""
            known = [(), *([ref[...] for ref in refs] for refs in aside)]
            found = [stage(k, tile_at(at), valid) for stage, k, at in zip(stages, known, tiles, strict=False)]
            if len(tiles) == len(stages):
                store(tiles[-1], found.pop())
            for refs, arrays in zip(aside, found, strict=False):
                for ref, array in zip(refs, arrays, strict=True):
                    ref[...] = array

        def in_flight(oldest: Position) -> list[Position]:
            tiles = [oldest]
            for _ in aside:
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

    if "total" in scratch:
        total, lost = scratch["total"], scratch["lost"]
        blocks = tiling.blocks_of_a_sum(classes)

        @pl.when(jnp.logical_or(lax.rem(j, jnp.int32(blocks)) == blocks - 1, at_the_end))
        def _add_to_total():
            total[...], lost[...] = add_exactly(total[...], lost[...], scratch["sums"][...])
            scratch["sums"][...] = jnp.zeros_like(scratch["sums"])

    if "sums" in scratch:

        @pl.when(at_the_end)
        def _finish():
            sums = total_of(total[...], lost[...]) if "total" in scratch else scratch["sums"][...]
            sums = jnp.sum(sums if tiling.turned else sums.T, axis=0, keepdims=True)
            outputs["value"][...] = task.losses(sums, ops)
