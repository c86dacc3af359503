"""Asymmetric loss for multilabel classifiers in JAX, fused: Pallas kernels on TPU and GPU, streamed jnp on the CPU."""

from asl_pallas.adaptive import AdaptiveAsymmetry, AsymmetryState
from asl_pallas.api import asymmetric_loss, multilabel_loss, sigmoid_asymmetric_loss
from asl_pallas.head import linear_asymmetric_loss, linear_multilabel_loss, linear_top_k
from asl_pallas.kernels.platforms import EXPORT_CHECKS
from asl_pallas.label_checks import checked_labels
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss
from asl_pallas.partial_labels import PartialLabels
from asl_pallas.prior import PriorLogitInit, decision_logit, label_frequencies, prior_logits
from asl_pallas.statistics import Statistics

__all__ = [
    "EXPORT_CHECKS",
    "AdaptiveAsymmetry",
    "AsymmetricLoss",
    "AsymmetryState",
    "PackedLabels",
    "PartialLabels",
    "PriorLogitInit",
    "SparseLabels",
    "Statistics",
    "asymmetric_loss",
    "checked_labels",
    "decision_logit",
    "label_frequencies",
    "linear_asymmetric_loss",
    "linear_multilabel_loss",
    "linear_top_k",
    "multilabel_loss",
    "prior_logits",
    "sigmoid_asymmetric_loss",
]
__version__ = "0.1.0"
