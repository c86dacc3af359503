"""From how often labels occur to where a head starts, and from what mistakes cost to where it decides.

All of it runs on the host, in NumPy; no array of the labels' dense size is made of bits or ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from asl_pallas.bits import BITS, GROUP, LANES
from asl_pallas.label_sources import CsrMatrix, as_array, check_ids, read_csr, refuse_other_forms, unwrap
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels

Batch = ArrayLike | PackedLabels | SparseLabels | PartialLabels | CsrMatrix
_ENCODED = (PackedLabels, SparseLabels, PartialLabels)
# Elements of dense labels, or words, that are looked at together.
_PART = 2**22


def label_frequencies(labels: Batch | Iterable[Batch], *, ignore_label: int | None = None) -> NDArray[np.float64]:
    """How often each label occurs, counted on the host.

    Args:
      labels: (..., classes) dense, bool, integers or soft labels in [0, 1]; `PackedLabels`, `SparseLabels` or
        `PartialLabels`; a SciPy CSR matrix; or an iterable of these, of one number of classes, which is walked once.
      ignore_label: the integer that marks what is not annotated, in dense labels.

    Returns:
      (classes,), the share of examples with the label among those where it is annotated; NaN where it never is.

    Raises:
      TypeError: no labels, or an ignore_label for labels that hold none.
      ValueError: labels outside of [0, 1], other numbers of classes, no examples.
    """
    counts: _Counts | None = None
    for batch in [labels] if _is_batch(labels) else labels:  # type: ignore[union-attr]
        found = _count(batch, ignore_label)
        if counts is not None and len(found.positives) != len(counts.positives):
            raise ValueError(
                f"labels have {len(counts.positives)} classes in one batch and {len(found.positives)} in another"
            )
        counts = found if counts is None else counts.plus(found)
    if counts is None or counts.examples == 0:
        raise ValueError("labels hold no example; expected one at least")
    with np.errstate(invalid="ignore"):
        return counts.positives / counts.annotated


def prior_logits(
    frequencies: ArrayLike,
    loss: ElementwiseLoss,
    *,
    at_least: float = 1e-6,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> NDArray[np.float64]:
    """The logits at which a head that knows the labels' frequencies alone has the least loss: its bias's right start.

    For cross-entropy that is the log-odds, log(p / (1 - p)); a loss that takes weight from easy negatives has its
    optimum higher up, `AsymmetricLoss(4, 1, 0.05)` at a sigmoid of 0.22 for a label of one in a thousand. A head
    that starts elsewhere spends its first epochs on getting there.

    Args:
      frequencies: (classes,), shares between 0 and 1, as of `label_frequencies`.
      loss: that is trained with, and pos_weight and label_smoothing as it is given them.
      at_least: frequencies come no nearer to 0 and 1 than this, so that a label never seen has a finite logit.

    Returns:
      (classes,), float64.

    Raises:
      TypeError: a loss that is no loss object.
      ValueError: frequencies outside of [0, 1] or of another shape; at_least not between 0 and 0.5; a loss without a
        link, see `ElementwiseLoss.probability`.
    """
    _check_loss(loss)
    share = np.asarray(frequencies, np.float64)
    if share.ndim != 1:
        raise ValueError(f"frequencies have shape {share.shape}; expected (classes,)")
    if not 0 < at_least < 0.5:
        raise ValueError(f"at_least={at_least}; expected 0 < at_least < 0.5")
    if not (inside := (share >= 0) & (share <= 1)).all():
        raise ValueError(f"frequencies hold {share[~inside][0]}; expected 0 <= frequency <= 1")
    logits = _logit(loss, np.clip(share, at_least, 1 - at_least), pos_weight, label_smoothing)
    if logits.shape != share.shape:
        raise ValueError(
            f"frequencies have shape {share.shape}, and the logits {logits.shape} with the loss's hyper-parameters and "
            "pos_weight; expected a value per class at most"
        )
    return logits


class PriorLogitInit:
    """An initializer of biases, `prior_logits` as Flax (NNX and linen) and Haiku call one.

        bias_init=PriorLogitInit(frequencies, loss)                     # Flax: init(key, shape, dtype)
        hk.Linear(classes, b_init=PriorLogitInit(frequencies, loss))    # Haiku: init(shape, dtype)
        eqx.tree_at(lambda m: m.bias, linear, jnp.asarray(prior_logits(frequencies, loss)))    # Equinox has none

    Args:
      frequencies, loss, and options: those of `prior_logits`.

    Raises:
      TypeError, ValueError: as `prior_logits`; when it is called, a bias of another shape than the frequencies.
    """

    def __init__(self, frequencies: ArrayLike, loss: ElementwiseLoss, **options: Any):
        self.logits = prior_logits(frequencies, loss, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Array:
        shape, dtype = self._read(*arguments, **named)
        if tuple(shape) != self.logits.shape:
            raise ValueError(f"frequencies have shape {self.logits.shape}; expected {tuple(shape)}, the bias's")
        return jnp.asarray(self.logits, dtype)

    @staticmethod
    def _read(*arguments: Any, **named: Any) -> tuple[Any, Any]:
        """(key, shape, dtype), or (shape, dtype) where what comes first is a shape."""
        if arguments and not isinstance(arguments[0], (tuple, list)):
            arguments = arguments[1:]
        shape = arguments[0] if arguments else named["shape"]
        dtype = arguments[1] if len(arguments) > 1 else named.get("dtype", jnp.float32)
        return shape, dtype


def decision_logit(
    loss: ElementwiseLoss,
    *,
    false_positive_cost: ArrayLike = 1.0,
    false_negative_cost: ArrayLike = 1.0,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> NDArray[np.float64]:
    """The logit from which on it costs less to call a label present, exact by the loss's link.

    That is where the probability of the label is false_positive_cost / (false_positive_cost + false_negative_cost).

    Args:
      loss: that the model was trained with, and pos_weight and label_smoothing as it was given them.
      false_positive_cost, false_negative_cost: above 0, in any one unit; numbers or arrays, (classes,) say.

    Returns:
      Logits of the costs' shape, float64.

    Raises:
      TypeError: a loss that is no loss object.
      ValueError: a cost that isn't above 0 and finite; a loss without a link, see `ElementwiseLoss.probability`.
    """
    _check_loss(loss)
    costs = []
    for name, cost in (("false_positive_cost", false_positive_cost), ("false_negative_cost", false_negative_cost)):
        cost = np.asarray(cost, np.float64)
        if not (np.isfinite(cost) & (cost > 0)).all():
            raise ValueError(f"{name}={cost}; expected numbers above 0 and finite")
        costs.append(cost)
    threshold = costs[0] / (costs[0] + costs[1])
    return _logit(loss, threshold, pos_weight, label_smoothing)


def _logit(loss: ElementwiseLoss, p: NDArray[Any], pos_weight: Any, label_smoothing: float) -> NDArray[np.float64]:
    """On the host, also where hyper-parameters and weights are JAX's."""
    loss, pos_weight = jax.tree.map(np.asarray, (loss, pos_weight))
    return loss.logit(p, pos_weight=pos_weight, label_smoothing=label_smoothing)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, ElementwiseLoss):
        raise TypeError(f"loss={loss!r}; expected a loss object, such as asl_pallas.AsymmetricLoss()")


class _Counts:
    """By class: the sum of the labels, and how many are annotated; and how many examples there are."""

    def __init__(self, positives: NDArray[Any], annotated: NDArray[Any] | int, examples: int):
        self.positives = positives.astype(np.float64)
        self.annotated = np.broadcast_to(np.asarray(annotated, np.float64), positives.shape)
        self.examples = examples

    def plus(self, other: _Counts) -> _Counts:
        return _Counts(
            self.positives + other.positives, self.annotated + other.annotated, self.examples + other.examples
        )


def _is_batch(labels: Any) -> bool:
    if (
        isinstance(labels, _ENCODED)
        or hasattr(labels, "dtype")
        or hasattr(labels, "__jax_array__")
        or hasattr(labels, "tocsr")
    ):
        return True
    if isinstance(labels, (list, tuple)):
        return bool(labels) and not any(map(_is_batch, labels))
    return not isinstance(labels, Iterable)


def _count(labels: Any, ignore_label: int | None) -> _Counts:
    if ignore_label is not None and (isinstance(labels, _ENCODED) or hasattr(labels, "indptr")):
        raise TypeError(f"ignore_label={ignore_label} is for dense labels, and these are {type(labels).__name__}")
    if isinstance(labels, PartialLabels):
        positives, negatives = (_count_encoded(part) for part in (labels.positives, labels.negatives))
        both = _count_encoded(_both(labels))
        return _Counts(positives, positives + negatives - both, _examples(labels.shape))
    if isinstance(labels, (PackedLabels, SparseLabels)):
        return _Counts(_count_encoded(labels), _examples(labels.shape), _examples(labels.shape))
    if hasattr(labels, "indptr"):
        counts, ids = read_csr(labels)
        rows = np.repeat(np.arange(len(counts)), counts)
        return _Counts(_count_ids(rows, ids, int(labels.shape[1])), len(counts), len(counts))
    return _count_dense(labels, ignore_label)


def _both(labels: PartialLabels) -> PackedLabels:
    """What is in the positives and in the negatives, and so positive."""
    parts = [
        part.to_packed() if isinstance(part, SparseLabels) else part for part in (labels.positives, labels.negatives)
    ]
    words = [np.asarray(jax.device_get(part.checked().words)) for part in parts]
    return PackedLabels(words[0] & words[1], labels.classes)


def _examples(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[:-1], dtype=np.int64))


def _count_dense(labels: Any, ignore_label: int | None) -> _Counts:
    refuse_other_forms("labels", labels)
    array = np.asarray(jax.device_get(as_array(unwrap(labels))))
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise TypeError(f"labels are {array.dtype}{list(array.shape)}; expected an array (..., classes) of numbers")
    rows = array.reshape(-1, array.shape[-1])
    positives, annotated = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    step = max(1, _PART // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        keep = np.ones(part.shape, bool) if ignore_label is None else part != ignore_label
        if (wrong := part[keep & ~((part >= 0) & (part <= 1))]).size:
            raise ValueError(f"labels hold {wrong[0]}; expected 0 or 1, or soft labels in [0, 1]")
        positives += np.sum(part, axis=0, dtype=np.float64, where=keep)
        annotated += keep.sum(axis=0)
    return _Counts(positives, annotated, len(rows))


def _count_encoded(labels: PackedLabels | SparseLabels) -> NDArray[Any]:
    labels = labels.checked()
    if isinstance(labels, SparseLabels):
        ids = np.asarray(jax.device_get(labels.ids))
        ids = check_ids(ids.reshape(_examples(labels.shape), ids.shape[-1]), labels.classes, padding=True)
        at, slot = np.nonzero(ids >= 0)
        return _count_ids(at, ids[at, slot], labels.classes)
    words = np.asarray(jax.device_get(labels.words))
    words = words.reshape(_examples(labels.shape), words.shape[-1])
    by_bit = np.zeros((BITS, words.shape[1]), np.int64)
    step = max(1, _PART // max(1, words.shape[1]))
    for start in range(0, len(words), step):
        for bit in range(BITS):
            by_bit[bit] += np.sum(words[start : start + step] >> np.uint32(bit) & np.uint32(1), axis=0, dtype=np.int64)
    by_class = by_bit.reshape(BITS, -1, LANES).swapaxes(0, 1).reshape(words.shape[1] // LANES * GROUP)
    return by_class[: labels.classes]


def _count_ids(rows: NDArray[Any], ids: NDArray[Any], classes: int) -> NDArray[Any]:
    """What comes twice in a row counts once."""
    distinct = np.unique(rows.astype(np.int64) * classes + ids)
    return np.bincount(distinct % max(classes, 1), minlength=classes)
