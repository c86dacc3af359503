"""Which kernel serves a call, and the reason why one can't."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from asl_pallas.kernels import xla
from asl_pallas.kernels.platforms import Code, by_platform
from asl_pallas.kernels.tile import ENCODED, Form, Operands, Result, Task
from asl_pallas.kernels.tiling import LARGEST_INT32, MOSAIC_GPU_CLASSES, TPU_MOST_IDS, tpu_pays, triton_pays
from asl_pallas.kernels.versions import lacks_mosaic_gpu, unify_varying_axes
from asl_pallas.losses.base import PER_CLASS, ElementwiseLoss

# The name that a caller may ask for -> the platform that its kernel is lowered for.
PLATFORMS: dict[str, Any] = {"xla": None, "mosaic_tpu": "tpu", "triton": "cuda", "mosaic_gpu": "cuda"}
# What implementation=None picks for a platform. On an H100 mosaic_gpu takes as long as triton, or up to a third longer.
CHOSEN = ("mosaic_tpu", "triton")
# The dtypes of logits, labels and where that a kernel can load.
LOADS = {
    "mosaic_tpu": ("float32", "bfloat16", "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
    "triton": (
        *("float32", "bfloat16", "float16", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    ),
    "mosaic_gpu": ("float32", "bfloat16", "float16", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
}
# The jnp formula in one expression on every platform, for what the library itself decides to leave to XLA.
PLAIN = "plain"

_interpreted = contextvars.ContextVar("asl_pallas_interpret_mode", default=False)


@contextlib.contextmanager
def interpret_mode() -> Iterator[None]:
    """Kernels that are asked for by name run in Pallas's interpreter, on any platform: for tests, and slow."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    return _interpreted.get()


def refusal(implementation: str, operands: Operands, labels: Form = "dense", statistics: bool = False) -> str | None:
    """Why this kernel can't serve this call on its own platform, or None where it can."""
    if implementation == "xla":
        return None
    if _is_symbolic(operands):
        return f"its blocks are made for known sizes, and the logits have the symbolic shape {operands.logits.shape}"
    if implementation == "mosaic_gpu":
        if lacking := lacks_mosaic_gpu():
            return lacking
        if statistics:
            return "it adds up losses alone, and no statistics; 'triton' does"
        if labels != "dense":
            return f"it loads dense labels, and these are {labels}; 'triton' serves them"
        if (classes := operands.logits.shape[-1]) < MOSAIC_GPU_CLASSES:
            return f"it walks rows of at least {MOSAIC_GPU_CLASSES} classes, and the logits have {classes}"
    if operands.logits.dtype == jnp.float64:
        return "it computes in float32 and the logits are float64; 'xla' computes in float64"
    if implementation == "mosaic_tpu" and labels == "sparse":
        k = max(array.shape[-1] for name, array in operands.arrays() if name in ENCODED)
        if k > TPU_MOST_IDS:
            return f"it holds at most {TPU_MOST_IDS} ids a row, and these have {k}; PackedLabels serve any number"
    if reason := _beyond_its_offsets(implementation, operands):
        return reason
    supported = LOADS[implementation]
    for name in ("logits", "labels", "where"):
        operand = getattr(operands, name)
        if operand is not None and operand.dtype.name not in supported and not _is_converted(implementation, operand):
            return f"it loads no {operand.dtype.name} {name}; it loads {', '.join(supported)}"
    return None


def _is_symbolic(operands: Operands) -> bool:
    """Whether a size isn't known yet, as in jax.export with jax.export.symbolic_shape: no choice may depend on it."""
    return not all(isinstance(n, int) for _, array in operands.arrays() for n in array.shape)


def _beyond_its_offsets(implementation: str, operands: Operands) -> str | None:
    """Why the kernel can't reach all elements of so large an array, or None where it can."""
    if implementation == "mosaic_gpu" and operands.logits.size > LARGEST_INT32:
        return f"it counts at most {LARGEST_INT32} elements on a device, and the logits have {operands.logits.size}"
    if implementation == "triton":
        for name, array in operands.arrays():
            # JAX's lowering counts in 64 bits only from 2^32 bytes on.
            if array.dtype.itemsize == 1 and LARGEST_INT32 < array.size <= 2**32:
                return f"its offsets of one-byte elements have 32 bits, and {name} has {array.size} elements"
    return None


def _is_converted(implementation: str, operand: Array) -> bool:
    """A mask that is constant along examples or classes is so small that it may be converted first."""
    *leading, classes = operand.shape
    return implementation == "mosaic_gpu" and operand.dtype == jnp.bool_ and (classes == 1 or math.prod(leading) == 1)


def run(task: Task, operands: Operands, implementation: str | None, interpret: bool) -> Result:
    """Value and gradient by the kernel of that name, or by the best for the platform that this is lowered for.

    The operands have any number of leading dimensions; each has the logits' rank, and may be constant along some.
    """
    leading = operands.logits.shape[:-1]
    if implementation == PLAIN or _is_symbolic(operands) or operands.logits.size == 0:
        return xla.run(task, operands)
    value, gradient, sums = _run_matrix(task, unify_varying_axes(_matrices(operands)), implementation, interpret)
    if task.value is not None:
        value = value.reshape(leading if task.value == "rows" else operands.logits.shape)
    sums = jax.tree.map(lambda part: part.reshape(leading), sums)
    return Result(value, None if gradient is None else gradient.reshape(operands.logits.shape), sums)


def _run_matrix(task: Task, operands: Operands, implementation: str | None, interpret: bool) -> Result:
    if interpret and implementation == "mosaic_gpu":
        # Its interpreter has effects that JAX has to see while it traces, and no operation's lowering may bring in.
        return _kernel(implementation, task, operands, interpret=True)
    return by_platform(operands, _TaskCode(task, _shapes_of(operands), implementation, interpret))


def _shapes_of(operands: Operands) -> Operands:
    return jax.tree.map(lambda operand: jax.ShapeDtypeStruct(operand.shape, operand.dtype), operands)


@dataclasses.dataclass(frozen=True)
class _TaskCode:
    """What serves a task, or those of its results which somebody asks for, by platform."""

    task: Task
    shapes: Operands
    implementation: str | None
    interpret: bool

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        part = self._part(asked)
        functions: dict[str, Callable[[Operands], Any]]
        plain: Callable[[Operands], Any] = functools.partial(xla.run, part)
        if self.interpret and self.implementation not in (None, "xla"):
            functions = {"default": functools.partial(_kernel, self.implementation, part, interpret=True)}
        else:
            functions = _functions(part, self.shapes, self.implementation, plain)
        if asked and part.statistics and not all(asked):
            chosen = functools.partial(_chosen, self.task, asked)
            return chosen(plain), {name: chosen(function) for name, function in functions.items()}
        return plain, functions

    def _part(self, asked: tuple[bool, ...]) -> Task:
        """What to compute for these results; statistics, if any of them is asked for, come with the value."""
        task = self.task
        if not asked or all(asked):
            return task
        numbers = iter(asked)
        value = next(numbers) if task.value else False
        gradient = next(numbers) if task.gradient else False
        statistics = any(numbers)
        return dataclasses.replace(
            task, value=task.value if value or statistics else None, gradient=gradient, statistics=statistics
        )

    def explain(self, error: Exception) -> Exception:
        """What a kernel says of a loss that it can't compile: ours can be, a user's own need not."""
        if self.implementation == "xla" or isinstance(error, (NotImplementedError, TypeError)):
            return error
        first = next(iter(str(error).splitlines()), "")
        return NotImplementedError(
            f"Pallas can't lower {self.task.loss!r} into a kernel: {type(error).__name__}: {first[:300]}; "
            "implementation='xla' computes any loss"
        )

    def merged(self, operands: Operands, mapped: Operands) -> tuple[Operands, _TaskCode] | None:
        """Under vmap: the rows of all examples in one call, where nothing that has all classes must be copied for it.

        So a kernel is chosen by how many rows there are in all, and runs once.
        """
        rows, classes = self.shapes.logits.shape
        if not all((mapped.logits, mapped.labels, mapped.negatives is not False)):
            return None
        size = operands.logits.shape[0]
        loss = self.task.loss
        if mapped.scalars:
            operands, mapped, loss = _scalars_by_row(operands, mapped, loss)

        def fits(name: str, array: Array, is_mapped: bool) -> bool:
            by_row, by_class = array.shape[-2] == rows, array.shape[-1] == classes
            return name in ENCODED or rows == 1 or not by_class or by_row == is_mapped

        def merge(_: str, array: Array, is_mapped: bool) -> Array:
            if not is_mapped and array.shape == (1, classes):
                return array
            of_all = jnp.broadcast_to(array, (size, rows, array.shape[-1]))
            return of_all.reshape(size * rows, array.shape[-1])

        if not all(jax.tree.leaves(operands.map(fits, mapped)._replace(scalars=None))):
            return None
        merged = operands.map(merge, mapped)
        task = dataclasses.replace(self.task, loss=loss)
        return merged, dataclasses.replace(self, task=task, shapes=_shapes_of(merged))


def _chosen(task: Task, asked: tuple[bool, ...], function: Callable[[Operands], Result]) -> Callable[[Operands], Any]:
    """The function, with the results that are asked for alone, in a list."""

    def chosen(operands: Operands) -> list[Any]:
        value, gradient, sums = function(operands)
        there = [*([value] if task.value else []), *([gradient] if task.gradient else []), *jax.tree.leaves(sums)]
        return [part for part, wanted in zip(there, asked, strict=True) if wanted]

    return chosen


def _scalars_by_row(
    operands: Operands, mapped: Operands, loss: ElementwiseLoss
) -> tuple[Operands, Operands, ElementwiseLoss]:
    """Scalars that differ between examples as arrays with one number per row."""
    names = loss.traced()
    numbers = [operands.scalars[:, n, None, None] for n in range(operands.scalars.shape[1])]
    arrays = dict(zip(names, [*numbers, *operands.vectors], strict=True))
    are_mapped = dict(zip(names, [*(True for _ in numbers), *mapped.vectors], strict=True))
    loss = loss.replaced(dict.fromkeys(names, PER_CLASS))
    in_order = loss.traced()
    return (
        operands._replace(vectors=tuple(arrays[name] for name in in_order), scalars=None),
        mapped._replace(vectors=tuple(are_mapped[name] for name in in_order), scalars=None),
        loss,
    )


def _functions(
    task: Task, shapes: Operands, implementation: str | None, plain: Callable[[Operands], Result]
) -> dict[str, Callable[[Operands], Result]]:
    """What serves a task on operands of these shapes, by platform."""
    if implementation not in (None, "xla"):
        if reason := refusal(implementation, shapes, task.labels, task.statistics):  # of what vmap has put together
            raise NotImplementedError(f"implementation={implementation!r} can't serve this call: {reason}")
        kernel = functools.partial(_kernel, implementation, task)
        return {PLATFORMS[implementation]: kernel, "default": functools.partial(_refuse, implementation)}
    functions: dict[str, Callable[[Operands], Result]] = {"cpu": functools.partial(xla.run_streamed, task)}
    if implementation is None:
        for name in CHOSEN:
            if refusal(name, shapes, task.labels, task.statistics) is None and _pays(name, task, shapes):
                functions[PLATFORMS[name]] = functools.partial(_kernel, name, task)
    return {**functions, "default": plain}


def _pays(implementation: str, task: Task, operands: Operands) -> bool:
    """Whether the kernel is no slower than what XLA makes of the formula: by schedule on a TPU, measured on an H100."""
    rows, classes = operands.logits.shape
    return (tpu_pays if implementation == "mosaic_tpu" else triton_pays)(rows, classes, task.labels)


def _matrices(operands: Operands) -> Operands:
    """Every operand as (rows, classes), (rows, 1) or (1, classes); words and ids as (rows, words) and (rows, k)."""
    *leading, _ = operands.logits.shape
    rows = math.prod(leading)

    def matrix(_: str, operand: Array) -> Array:
        if operand.ndim == 2:
            return operand
        if all(n == 1 for n in operand.shape[:-1]):
            return operand.reshape(1, operand.shape[-1])
        return jnp.broadcast_to(operand, (*leading, operand.shape[-1])).reshape(rows, operand.shape[-1])

    return operands.map(matrix)


def _kernel(name: str, task: Task, operands: Operands, interpret: bool = False) -> Result:
    """Runs the kernel of that name; who never lowers for its platform never waits for Pallas to be imported."""
    return importlib.import_module(f"{__name__}.{name}").run(task, operands, interpret=interpret)


def _refuse(implementation: str, operands: Operands) -> Result:
    raise NotImplementedError(
        f"implementation={implementation!r} needs the platform {PLATFORMS[implementation]!r}, and this is lowered for "
        "another; implementation=None picks what the platform has"
    )
