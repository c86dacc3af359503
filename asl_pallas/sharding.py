"""Which part of the work is whose, under a mesh.

The kernels see one device's shard: a jax.shard_map around each of them says so to XLA, which could partition them no
other way. An element's loss needs nothing of its neighbours', so the only thing that moves is one sum an example, over
the mesh axes that share the classes out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from asl_pallas.bits import GROUP, cut
from asl_pallas.kernels.tile import ENCODED, Operands, Result, Task
from asl_pallas.kernels.versions import vary_as_operands

Names = tuple[str, ...]
Axes = tuple[Names, ...]
# No dimension's size: one that is alike on all devices.
ALIKE = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh, and for each dimension of the logits the mesh axes that share it out."""

    mesh: Any
    axes: Axes

    def parts(self, names: Names) -> int:
        return math.prod(self.mesh.shape[name] for name in names)

    def spec(self, operand: Array, shape: tuple[int, ...], only: AxisType | None = None) -> PartitionSpec:
        """An operand of the logits' rank lies as they do, but for dimensions along which it is constant."""
        kinds = kinds_of(self.mesh)
        entries = []
        for size, of_logits, names in zip(operand.shape, shape, self.axes, strict=True):
            kept = tuple(n for n in names if only is None or kinds[n] == only) if size == of_logits else ()
            entries.append(kept or None)
        return PartitionSpec(*entries)


class CannotCutError(Exception):
    """No shard_map can be written: how the logits lie is unknown, or their shards aren't equal."""


def layout_of(logits: Array, logits_spec: PartitionSpec | None) -> Layout | None:
    """How the logits lie on the mesh in sight; None where a kernel can be called as it is.

    That is without a mesh, on a mesh of one device, and inside a shard_map over all of the mesh.
    """
    mesh = mesh_of(logits)
    kinds = kinds_of(mesh)
    if mesh.empty or all(kind == AxisType.Manual for kind in kinds.values()):
        return None
    axes = axes_of(logits, logits_spec, kinds, "logits")
    if mesh.size == 1:
        return None
    if logits_spec is None and AxisType.Auto in kinds.values():
        auto = ", ".join(name for name, kind in kinds.items() if kind == AxisType.Auto)
        raise CannotCutError(
            f"the mesh axes {auto} are Auto, where JAX can't see how the logits lie: pass "
            "logits_spec=PartitionSpec(...) to run the kernel on every shard"
        )
    layout = Layout(mesh, axes)
    for size, names in zip(logits.shape, axes, strict=True):
        parts = layout.parts(names)
        if logits.size and size % parts:
            raise CannotCutError(f"logits_spec={logits_spec} cuts a dimension of {size} into {parts} unequal parts")
    return layout


def mesh_of(*arrays: Array) -> Any:
    """The mesh that an array lies on, or else the one in context."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    return next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())


def axes_of(array: Array, spec: PartitionSpec | None, kinds: dict[str, AxisType], name: str) -> Axes:
    """The mesh axes of each dimension: the Explicit ones that JAX sees and the Auto ones that `spec` adds.

    `name` is what the caller calls the array, and with _spec behind it the spec.
    """
    seen = names_of(jax.typeof(array).sharding.spec, array.ndim)
    axes = [[n for n in names if kinds[n] == AxisType.Explicit] for names in seen]
    for dimension, names in enumerate([] if spec is None else names_of(spec, array.ndim)):
        for axis in names:
            if axis not in kinds:
                raise ValueError(f"{name}_spec={spec} names the axis {axis!r}; the mesh has {', '.join(kinds)}")
            if kinds[axis] == AxisType.Explicit and axis not in axes[dimension]:
                raise ValueError(
                    f"{name}_spec={spec} puts the Explicit axis {axis!r} on dimension {dimension}; the {name} "
                    f"lie as {jax.typeof(array).sharding.spec}"
                )
            if kinds[axis] == AxisType.Auto:
                axes[dimension].append(axis)
    return tuple(map(tuple, axes))


def on_shards(run: Callable[[Operands], Result], task: Task, operands: Operands, layout: Layout) -> Result:
    """`run` on every device's shard, and the sums over the classes added up between those that share them out."""
    kinds = kinds_of(layout.mesh)
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    class_axes = layout.axes[-1]
    classes = operands.logits.shape[-1] // layout.parts(class_axes)
    words_are_cut = _words_are_cut(task, classes)
    shapes = _shapes(task, operands, layout)
    if AxisType.Explicit in kinds.values():
        operands = operands.map(lambda name, operand: _lay(operand, layout, shapes[name]))
    specs = operands.map(lambda name, operand: layout.spec(operand, shapes[name]))
    specs = specs._replace(scalars=None if operands.scalars is None else PartitionSpec())

    def body(operands: Operands) -> Result:
        if class_axes and task.labels != "dense" and not words_are_cut:
            first = lax.axis_index(class_axes) * classes

            def own(name: str, array: Array) -> Array:
                if name not in ENCODED:
                    return array
                return array - first if task.labels == "sparse" else cut(array, first, classes)

            operands = operands.map(own)
        value, gradient, sums = run(operands)
        if task.value == "rows" and class_axes:
            value, sums = lax.psum((value, sums), class_axes)
        return Result(value, gradient, sums)

    of_logits = specs.logits
    of_rows = PartitionSpec(*of_logits[:-1])
    on_mesh = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=task.results(sums=of_rows, elements=of_logits, gradient=of_logits, statistics=of_rows),
        # Where none is taken JAX's default: under vmap it leaves out the axis that shares out the mapped dimension.
        axis_names=free if len(free) < len(kinds) else frozenset(),
        check_vma=False,
    )
    return vary_as_operands(on_mesh, operands)


def shard_of(task: Task, operands: Operands, layout: Layout | None) -> Operands:
    """The shapes and dtypes of one device's part."""

    def shard(operand: Any, shape: tuple[int, ...]) -> Any:
        names = [] if layout is None else names_of(layout.spec(operand, shape), operand.ndim)
        parts = [1 if layout is None else layout.parts(of_dimension) for of_dimension in names]
        sizes = tuple(n // k for n, k in zip(operand.shape, parts, strict=True)) if parts else operand.shape
        return jax.ShapeDtypeStruct(sizes, operand.dtype)

    shapes = {} if layout is None else _shapes(task, operands, layout)
    return operands.map(lambda name, operand: shard(operand, shapes.get(name, ())))


def _shapes(task: Task, operands: Operands, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of what shape an operand is where it lies as the logits do, by name."""
    shape = operands.logits.shape
    shapes = {name: shape for name, _ in operands.arrays()}
    if task.labels != "dense":
        # Words lie as the logits do where a shard has whole groups of them. Else every device that shares the classes
        # out has all of them, as it has all ids.
        are_cut = _words_are_cut(task, shape[-1] // layout.parts(layout.axes[-1]))
        for name, array in operands.arrays():
            if name in ENCODED:
                shapes[name] = (*shape[:-1], array.shape[-1] if are_cut else ALIKE)
    return shapes


def _words_are_cut(task: Task, classes: int) -> bool:
    """Whether the words of a shard's classes are whole groups."""
    return task.labels == "packed" and classes % GROUP == 0


def _lay(operand: Array, layout: Layout, shape: tuple[int, ...]) -> Array:
    """Explicit axes have to agree before a shard_map: labels and the rest move to where the logits are."""
    spec = layout.spec(operand, shape, only=AxisType.Explicit)
    if names_of(jax.typeof(operand).sharding.spec, operand.ndim) == names_of(spec, operand.ndim):
        return operand
    return jax.reshard(operand, NamedSharding(layout.mesh, spec))


def on_any_mesh(function: Callable[..., Any], *arrays: Any) -> Any:
    """function(*arrays), small results that all devices have, of arrays that may lie otherwise than each other.

    Between Explicit axes JAX wants to be told who moves; as Auto ones it decides.
    """
    mesh = mesh_of(*jax.tree.leaves(arrays))
    explicit = tuple(name for name, kind in kinds_of(mesh).items() if kind == AxisType.Explicit)
    if not explicit:
        return function(*arrays)
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=PartitionSpec())(*arrays)


def kinds_of(mesh: Any) -> dict[str, AxisType]:
    """Whether each mesh axis is Auto, Explicit or Manual."""
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def names_of(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    return [() if e is None else e if isinstance(e, tuple) else (e,) for e in entries]
