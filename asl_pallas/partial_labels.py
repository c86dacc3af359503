"""Labels with a third state, not annotated, in bits or ids: the positives and the annotated negatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from asl_pallas.label_sources import unwrap
from asl_pallas.labels import PackedLabels, SparseLabels


@jax.tree_util.register_pytree_with_keys_class
class PartialLabels:
    """Which labels are positive and which negative; all others are not annotated. For losses with three states.

    What is annotated is kept, since it is little of it where annotation is partial: a dozen labels an example of
    thousands of classes, as in OpenImages.

    Args:
      positives, negatives: both `PackedLabels`, or both `SparseLabels`, of one shape. What is in both is positive.

    Raises:
      TypeError: two forms, or another one.
      ValueError: two shapes.
    """

    positives: Any
    negatives: Any

    def __init__(self, positives: PackedLabels | SparseLabels, negatives: PackedLabels | SparseLabels):
        for name, part in (("positives", positives), ("negatives", negatives)):
            if not isinstance(part, (PackedLabels, SparseLabels)):
                raise TypeError(f"{name} are {type(part).__name__}; expected PackedLabels or SparseLabels")
        if type(positives) is not type(negatives):
            raise TypeError(
                f"positives are {type(positives).__name__} and negatives {type(negatives).__name__}; expected one form"
            )
        if positives.shape != negatives.shape:
            raise ValueError(f"positives have shape {positives.shape} and negatives {negatives.shape}; expected one")
        self.positives, self.negatives = positives, negatives

    @classmethod
    def from_dense(
        cls, labels: Any, *, unannotated_label: int = -1, form: Literal["packed", "sparse"] = "sparse"
    ) -> PartialLabels:
        """From (..., classes) of the integers 1, 0 and `unannotated_label`.

        Raises:
          TypeError: labels that are no integers.
          ValueError: concrete labels of another value; another form.
        """
        kinds: dict[str, Any] = {"packed": PackedLabels, "sparse": SparseLabels}
        if form not in kinds:
            raise ValueError(f"form={form!r}; expected 'packed' or 'sparse'")
        labels = unwrap(labels)
        labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels have dtype {labels.dtype}; expected an integer dtype")
        if isinstance(labels, np.ndarray):
            wrong = labels[(labels != 0) & (labels != 1) & (labels != unannotated_label)]
            if wrong.size:
                raise ValueError(f"labels hold {wrong[0]}; expected 0, 1 or unannotated_label={unannotated_label}")
        return cls(kinds[form].from_dense(labels == 1), kinds[form].from_dense(labels == 0))

    def to_dense(self, unannotated_label: int = -1) -> Any:
        """(..., classes), int8: 1, 0 and `unannotated_label`; NumPy from NumPy, JAX from JAX."""
        positive, negative = self.positives.to_dense(), self.negatives.to_dense()
        module: Any = np if isinstance(positive, np.ndarray) and isinstance(negative, np.ndarray) else jax.numpy
        return module.where(positive, 1, module.where(negative, 0, unannotated_label)).astype(np.int8)

    def checked(self) -> PartialLabels:
        """Itself, with every check of the constructor: one that comes out of a pytree hasn't been looked at."""
        return PartialLabels(self.positives.checked(), self.negatives.checked())

    @property
    def classes(self) -> int:
        return self.positives.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., classes), as a dense array's."""
        return self.positives.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.positives)

    def __iter__(self) -> Iterator[PartialLabels]:
        """The examples one by one, along the first dimension."""
        return map(PartialLabels, self.positives, self.negatives)

    def __getitem__(self, index: Any) -> PartialLabels:
        """Some of the examples, as `PackedLabels` and `SparseLabels` have it."""
        return PartialLabels(self.positives[index], self.negatives[index])

    def __repr__(self) -> str:
        return f"PartialLabels(positives={self.positives!r}, negatives={self.negatives!r})"

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        keys = map(jax.tree_util.GetAttrKey, ("positives", "negatives"))
        return tuple(zip(keys, (self.positives, self.negatives), strict=True)), None

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.positives, self.negatives), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> PartialLabels:
        """Without a check: JAX puts more than arrays into a pytree."""
        made = object.__new__(cls)
        made.positives, made.negatives = children
        return made
