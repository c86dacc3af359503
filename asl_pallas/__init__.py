"""Asymmetric loss for multilabel classifiers in JAX, fused: Pallas kernels on TPU and GPU, streamed jnp on the CPU."""

from asl_pallas.head import linear_asymmetric_loss, linear_top_k
from asl_pallas.kernels.platforms import EXPORT_CHECKS
from asl_pallas.label_checks import checked_labels
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import asymmetric_loss

__all__ = [
    "EXPORT_CHECKS",
    "PackedLabels",
    "SparseLabels",
    "asymmetric_loss",
    "checked_labels",
    "linear_asymmetric_loss",
    "linear_top_k",
]
__version__ = "0.1.0"
