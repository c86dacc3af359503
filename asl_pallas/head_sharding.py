"""Which part of a linear head is whose, under a mesh.

The examples are shared out over some mesh axes and the classes over others. Each device walks the chunks of its own
classes for its own examples, and what is added up between devices is the losses, the features' gradient over the axes
of the classes, and the parameters' gradients over the axes of the examples. A kernel that is shared out along d too, as
in fully sharded training, is put together a chunk at a time, and its gradient is taken apart again chunk by chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from asl_pallas import chunks
from asl_pallas.bits import GROUP, cut
from asl_pallas.chunks import Arrays, Exchange, Found, Work
from asl_pallas.kernels.tile import ENCODED, Form
from asl_pallas.kernels.versions import vary_as_operands
from asl_pallas.sharding import ALIKE, CannotCutError, Names, axes_of, kinds_of, mesh_of, names_of


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """The mesh, and the mesh axes that share out the features' leading dimensions, and d and classes of the kernel."""

    mesh: Any
    leading: tuple[Names, ...]
    depth: Names
    classes: Names

    @property
    def examples(self) -> Names:
        return tuple(name for names in self.leading for name in names)

    def parts(self, names: Names) -> int:
        return math.prod(self.mesh.shape[name] for name in names)

    def place(self) -> Names:
        """Of all mesh axes those that a shard_map may still take: the user's own shard_map may have taken some."""
        return tuple(name for name, kind in kinds_of(self.mesh).items() if kind != AxisType.Manual)


def layout_of(
    features: Array, kernel: Array, features_spec: PartitionSpec | None, kernel_spec: PartitionSpec | None
) -> HeadLayout | None:
    """How features and kernel lie on the mesh in sight; None where there is nothing to share out.

    That is without a mesh, on a mesh of one device, and inside a shard_map over all of the mesh.
    """
    mesh = mesh_of(features, kernel)
    kinds = kinds_of(mesh)
    if mesh.empty or all(kind == AxisType.Manual for kind in kinds.values()):
        return None
    of_features = axes_of(features, features_spec, kinds, "features")
    of_kernel = axes_of(kernel, kernel_spec, kinds, "kernel")
    if mesh.size == 1:
        return None
    if AxisType.Auto in kinds.values() and (features_spec is None or kernel_spec is None):
        auto = ", ".join(name for name, kind in kinds.items() if kind == AxisType.Auto)
        raise CannotCutError(
            f"the mesh axes {auto} are Auto, where JAX can't see how features and kernel lie: pass "
            "features_spec=PartitionSpec(...) and kernel_spec=PartitionSpec(...)"
        )
    layout = HeadLayout(mesh, of_features[:-1], *of_kernel)
    both = set(layout.examples) & set(layout.classes)
    if both and all(kinds[name] == AxisType.Explicit for name in both):
        # No product can lie so. `lay` moves the kernel: over d, as in fully sharded training, or else whole.
        depth = (*layout.depth, *(name for name in layout.classes if name in both))
        layout = HeadLayout(
            mesh,
            layout.leading,
            layout.depth if kernel.shape[0] % layout.parts(depth) else depth,
            tuple(name for name in layout.classes if name not in both),
        )
    elif both:
        raise CannotCutError(f"the mesh axes {', '.join(sorted(both))} share out both the examples and the classes")
    of_dimensions = (*layout.leading, layout.depth, layout.classes)
    dimensions = zip((*features.shape[:-1], *kernel.shape), of_dimensions, strict=True)
    for size, names in dimensions:
        if size % layout.parts(names):
            raise CannotCutError(f"a dimension of {size} is cut into {layout.parts(names)} unequal parts")
    return layout


def lay(arrays: Arrays, form: Form, layout: HeadLayout) -> Arrays:
    """Everything moved to where its part of the work is, on axes where JAX can see that it isn't."""
    if AxisType.Explicit not in kinds_of(layout.mesh).values():
        return arrays
    specs = _specs(arrays, form, layout)._asdict()

    def lay_one(array: Any, spec: Any) -> Any:
        if isinstance(array, tuple):
            return tuple(map(lay_one, array, spec))
        return None if array is None else _lay(array, spec, layout)

    return Arrays(**{name: lay_one(array, specs[name]) for name, array in arrays._asdict().items()})


def _lay(array: Array, spec: PartitionSpec, layout: HeadLayout) -> Array:
    kinds = kinds_of(layout.mesh)
    entries = [tuple(n for n in names if kinds[n] == AxisType.Explicit) for names in names_of(spec, array.ndim)]
    if names_of(jax.typeof(array).sharding.spec, array.ndim) == entries:
        return array
    return jax.reshard(array, NamedSharding(layout.mesh, PartitionSpec(*(names or None for names in entries))))


def _specs(arrays: Arrays, form: Form, layout: HeadLayout) -> Any:
    """`Arrays` of PartitionSpecs."""
    leading = arrays.features.shape[:-1]
    classes = arrays.kernel.shape[1]

    def like_logits(array: Array, whole: int) -> PartitionSpec:
        """Dimensions along which it is constant are not shared out; `whole` is its last one's size if that is cut."""
        sizes = zip(array.shape, (*leading, whole), (*layout.leading, layout.classes), strict=True)
        return PartitionSpec(*(names or None if size == of_logits else None for size, of_logits, names in sizes))

    specs: dict[str, Any] = {
        "features": PartitionSpec(*(names or None for names in layout.leading), None),
        "kernel": PartitionSpec(layout.depth or None, layout.classes or None),
        "bias": PartitionSpec(layout.classes or None),
        "scalars": PartitionSpec(),
    }
    for name, array in arrays._asdict().items():
        if array is None:
            specs[name] = None
        elif name in ENCODED:
            specs[name] = like_logits(array, array.shape[-1] if _is_cut(form, classes, layout) else ALIKE)
        elif name == "vectors":
            specs[name] = tuple(like_logits(vector, classes) for vector in array)
        elif name not in specs:
            specs[name] = like_logits(array, classes)
    return Arrays(**specs)


def on_shards(work: Work, arrays: Arrays, layout: HeadLayout, total: bool) -> Found:
    """`chunks.run` on every device's part, and the sums between devices."""
    form = work.task.labels
    specs = _specs(arrays, form, layout)
    classes = arrays.kernel.shape[1]

    def body(arrays: Arrays) -> Found:
        found = chunks.run(work, _own_labels(form, arrays, classes, layout), _exchange(layout))
        if total:
            found = found.summed()
        value, features, kernel, bias, sums = found
        # One sum over the devices for all of these numbers.
        value, sums = _sum((value, sums), (*layout.examples, *layout.classes) if total else layout.classes)
        return Found(
            value,
            features if features is None else _sum(features, layout.classes),
            kernel,
            bias if bias is None else _sum(bias, layout.examples),
            sums,
        )

    of_examples = PartitionSpec() if total else PartitionSpec(*specs.features[:-1])
    results = Found(
        value=of_examples,
        features=specs.features,
        kernel=specs.kernel,
        bias=specs.bias,
        sums=of_examples,
    )
    wanted = (*work.gradients, *(["value"] if work.task.value else []), *(["sums"] if work.task.statistics else []))
    out_specs = Found(**{name: getattr(results, name) for name in wanted})
    return _shard_map(body, layout, specs, out_specs)(lay(arrays, form, layout))


def top_k(
    features: Array, kernel: Array, bias: Array | None, k: int, chunk: int | None, precision: Any, layout: HeadLayout
) -> tuple[Array, Array]:
    """The best of every device's own best."""
    parts = layout.parts(layout.classes)
    of_device = min(k, kernel.shape[1] // parts)

    def body(arrays: Arrays) -> tuple[Array, Array]:
        own = chunks.top_k(arrays.features, arrays.kernel, arrays.bias, of_device, chunk, precision, _exchange(layout))
        scores, ids = own[0], own[1] + _first_class(layout, kernel.shape[1])
        if not layout.classes:
            return scores, ids
        # In the order of the classes, so that the lower id is still the first of equals.
        axis = scores.ndim - 1
        scores, ids = (lax.all_gather(x, layout.classes, axis=axis, tiled=True) for x in (scores, ids))
        scores, at = lax.top_k(scores, k)
        return scores, jnp.take_along_axis(ids, at, axis=axis)

    arrays = Arrays(features, kernel, bias, labels=None)
    specs = _specs(arrays, "dense", layout)
    return _shard_map(body, layout, specs, (specs.features, specs.features))(lay(arrays, "dense", layout))


def _shard_map(body: Any, layout: HeadLayout, in_specs: Any, out_specs: Any) -> Any:
    free = layout.place()
    on_mesh = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        axis_names=frozenset(free) if len(free) < len(layout.mesh.axis_names) else frozenset(),
        check_vma=False,
    )
    return functools.partial(vary_as_operands, on_mesh)


def _exchange(layout: HeadLayout) -> Exchange:
    """Chunk by chunk: a sum of the whole gradient at the end took as much memory again, with libtpu of jax 0.12."""

    def gather(chunk: Array) -> Array:
        return lax.all_gather(chunk, layout.depth, axis=0, tiled=True) if layout.depth else chunk

    def scatter(gradient: Array) -> Array:
        for name in layout.depth:
            if name in layout.examples:
                gradient = lax.psum_scatter(gradient, name, scatter_dimension=0, tiled=True)
            else:  # the same on all devices of this axis
                size = gradient.shape[0] // layout.mesh.shape[name]
                gradient = lax.dynamic_slice_in_dim(gradient, lax.axis_index(name) * size, size)
        return _sum(gradient, tuple(name for name in layout.examples if name not in layout.depth))

    return Exchange(gather, scatter)


def _is_cut(form: Form, classes: int, layout: HeadLayout) -> bool:
    """Whether labels are shared out as the classes are: dense ones, and the words of whole groups."""
    return form == "dense" or (form == "packed" and classes // layout.parts(layout.classes) % GROUP == 0)


def _own_labels(form: Form, arrays: Arrays, classes: int, layout: HeadLayout) -> Arrays:
    """Labels that weren't shared out with the classes, as labels of the device's own classes."""
    if not layout.classes or _is_cut(form, classes, layout):
        return arrays
    first = _first_class(layout, classes)

    def own(array: Any) -> Any:
        if array is None or form == "sparse":
            return array if array is None else array - first
        return cut(array, first, classes // layout.parts(layout.classes))

    return arrays._replace(labels=own(arrays.labels), negatives=own(arrays.negatives))


def _first_class(layout: HeadLayout, classes: int) -> Any:
    index = lax.axis_index(layout.classes) if layout.classes else jnp.int32(0)
    return index * (classes // layout.parts(layout.classes))


def _sum(arrays: Any, names: Names) -> Any:
    return lax.psum(arrays, names) if names else arrays
