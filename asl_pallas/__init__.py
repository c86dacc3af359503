"""Asymmetric loss for multilabel classifiers in JAX, fused: Pallas kernels on TPU and GPU, streamed jnp on the CPU."""

from asl_pallas.api import asymmetric_loss, multilabel_loss, sigmoid_asymmetric_loss
from asl_pallas.head import linear_asymmetric_loss, linear_multilabel_loss, linear_top_k
from asl_pallas.kernels.platforms import EXPORT_CHECKS
from asl_pallas.label_checks import checked_labels
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss
from asl_pallas.partial_labels import PartialLabels

__all__ = [
    "EXPORT_CHECKS",
    "AsymmetricLoss",
    "PackedLabels",
    "PartialLabels",
    "SparseLabels",
    "asymmetric_loss",
    "checked_labels",
    "linear_asymmetric_loss",
    "linear_multilabel_loss",
    "linear_top_k",
    "multilabel_loss",
    "sigmoid_asymmetric_loss",
]
__version__ = "0.1.0"
