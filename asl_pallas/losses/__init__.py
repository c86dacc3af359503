"""The losses of the family, and what one of your own derives from."""

from asl_pallas.losses.asymmetric import AsymmetricLoss
from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.focal import BinaryCrossEntropy, FocalLoss
from asl_pallas.losses.hill import HillLoss
from asl_pallas.losses.ops import Label, Ops
from asl_pallas.losses.polynomial import AsymmetricPolynomialLoss
from asl_pallas.losses.selective import SelectiveLoss
from asl_pallas.losses.self_paced import SelfPacedLoss
from asl_pallas.losses.varifocal import VarifocalLoss

__all__ = [
    "AsymmetricLoss",
    "AsymmetricPolynomialLoss",
    "BinaryCrossEntropy",
    "ElementwiseLoss",
    "FocalLoss",
    "HillLoss",
    "Label",
    "Ops",
    "SelectiveLoss",
    "SelfPacedLoss",
    "VarifocalLoss",
    "hyperparameter",
]
