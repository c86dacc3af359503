"""Flax modules. The only file of the package that needs flax: import it by name, `from asl_pallas.flax import ...`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("asl_pallas.flax needs flax: pip install 'asl-pallas[flax]'") from error
from jax import Array, lax
from jax.typing import ArrayLike

from asl_pallas.head import linear_multilabel_loss, linear_top_k
from asl_pallas.kernels.tile import compute_dtype
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels
from asl_pallas.prior import PriorLogitInit

Initializer = Any
_kernel_init = nnx.initializers.lecun_normal()
_DEFAULT = AsymmetricLoss()


class MultilabelHead(nnx.Module):
    """A linear layer (features -> logits of independent labels) with its loss and its best labels, neither by way of
    the logits: what `nnx.Linear` and `multilabel_loss` are together, in a fraction of the memory.

        head = MultilabelHead(1024, 1_000_000, label_frequencies=frequencies, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        loss = head.loss(features, SparseLabels.from_ids(ids, 1_000_000), axis=None)  # to train
        probabilities, ids = head.top_k(features, 5)                                   # to serve
        logits = head(features)                                                        # (..., classes), where needed

    Where the kernel is large, evaluate under `jax.jit` with the module split by `nnx.split`: `nnx.jit` returns all of a
    module's arrays, copies of those that did not change.

    In flax.linen the parameters are a Dense layer's, with the same names and shapes; `self.param` makes them and the
    functions take them:

        class Head(linen.Module):
            classes: int

            @linen.compact
            def __call__(self, features, labels):
                kernel = self.param("kernel", linen.initializers.lecun_normal(), (features.shape[-1], self.classes))
                bias = self.param("bias", PriorLogitInit(frequencies, AsymmetricLoss()), (self.classes,))
                return linear_asymmetric_loss(features, kernel, labels, bias=bias)

    Args:
      in_features: d, the features' last dimension.
      classes: how many labels.
      loss: what `loss` computes, a loss object; `AsymmetricLoss()` unless given.
      label_frequencies: (classes,), shares between 0 and 1, as of `label_frequencies`; the bias starts where the loss
        of a head that knows these alone is least, at `prior_logits`.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, rngs, kernel_metadata, bias_metadata: as in
        `nnx.Linear`. dtype is that of the products: the features are cast to it, and the kernel chunk by chunk; None
        for what features and kernel promote to. Names of mesh axes come as metadata or by `nnx.with_partitioning`, on a
        kernel (in_features, classes) and a bias (classes,).
      chunk_size: classes at a time, as in `linear_asymmetric_loss`.

    Raises:
      TypeError: a loss that is no loss object.
      ValueError: label_frequencies of another shape or outside of [0, 1], or for a loss that has no link; beside a
        bias_init, or without a bias.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        loss: ElementwiseLoss = _DEFAULT,
        label_frequencies: ArrayLike | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = _kernel_init,
        bias_init: Initializer | None = None,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        if not isinstance(loss, ElementwiseLoss):
            raise TypeError(f"loss={loss!r}; expected a loss object, such as asl_pallas.AsymmetricLoss()")
        if label_frequencies is not None:
            if bias_init is not None:
                raise ValueError("label_frequencies and bias_init both say where the bias starts; expected one of them")
            if not use_bias:
                raise ValueError("label_frequencies say where the bias starts, and use_bias=False leaves it out")
            bias_init = PriorLogitInit(label_frequencies, loss)
        bias_init = nnx.initializers.zeros_init() if bias_init is None else bias_init
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, classes), param_dtype), **kernel_metadata)
        self.bias: nnx.Param[Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (classes,), param_dtype), **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.loss_object = nnx.data(loss) if jax.tree.leaves(loss) else loss
        self.in_features = in_features
        self.classes = classes
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.chunk_size = chunk_size

    def __call__(self, features: ArrayLike) -> Array:
        """The logits (..., classes), float32 (float64 for float64), as `loss` and `top_k` would have them."""
        x, kernel, bias = self._parts(features)
        dtype = compute_dtype(x.dtype)
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        logits = lax.dot_general(
            x, kernel.astype(x.dtype), dimensions, precision=self.precision, preferred_element_type=dtype
        )
        return logits if bias is None else logits + bias.astype(dtype)

    def loss(
        self,
        features: ArrayLike,
        labels: ArrayLike | PackedLabels | SparseLabels | PartialLabels,
        *,
        loss: ElementwiseLoss | None = None,
        **options: Any,
    ) -> Any:
        """`linear_multilabel_loss` of this head, which says what the options are.

        `loss` takes the place of the head's own for this call, with another gamma_neg of a schedule say.
        """
        x, kernel, bias = self._parts(features)
        own: dict[str, Any] = {"bias": bias, "chunk_size": self.chunk_size, "precision": self.precision}
        return linear_multilabel_loss(self.loss_object if loss is None else loss, x, kernel, labels, **(own | options))

    def top_k(self, features: ArrayLike, k: int, **options: Any) -> tuple[Array, Array]:
        """Probabilities by the loss's link, and ids, of the best k labels of each example: `linear_top_k` of this head.

        With loss=None among the options the scores are logits.
        """
        x, kernel, bias = self._parts(features)
        own = {
            "loss": self.loss_object,
            "bias": bias,
            "chunk_size": self.chunk_size,
            "precision": self.precision,
        }
        return linear_top_k(x, kernel, k, **(own | options))

    def _parts(self, features: ArrayLike) -> tuple[Array, Array, Array | None]:
        """Features in the dtype of the products, and the parameters as they are: a copy of the kernel may not fit."""
        kernel = self.kernel[...]
        x = features if isinstance(features, jax.Array) else jnp.asarray(features)
        dtype = jnp.result_type(x, kernel) if self.dtype is None else self.dtype
        return x.astype(dtype), kernel, None if self.bias is None else self.bias[...]
