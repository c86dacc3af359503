"""What a run is made of: the loss's three numbers, the classifier's sizes, the head's first bias."""

import argparse
import dataclasses

import numpy as np

from asl_pallas import AdaptiveAsymmetry, AsymmetricLoss, prior_logits


@dataclasses.dataclass(frozen=True)
class Focus:
    """The asymmetric loss's hyper-parameters under a name for the table.

    (0, 0, 0) is sigmoid binary cross-entropy, and (g, g, 0) is focal loss.

    Attributes:
      target_gap: of the mean probabilities, to which gamma_neg moves itself; None where it stays.
    """

    name: str
    gamma_neg: float
    gamma_pos: float
    clip: float
    target_gap: float | None = None

    @property
    def loss(self) -> AsymmetricLoss:
        return AsymmetricLoss(self.gamma_neg, self.gamma_pos, self.clip)

    @property
    def controller(self) -> AdaptiveAsymmetry | None:
        if self.target_gap is None:
            return None
        return AdaptiveAsymmetry(target_gap=self.target_gap, rate=RATE, gamma_neg=self.gamma_neg)

    @property
    def numbers(self) -> str:
        gamma_neg = f"{self.gamma_neg:g}" if self.target_gap is None else "adaptive"
        return f"({gamma_neg}, {self.gamma_pos:g}, {self.clip:g})"


# Of gamma_neg, per unit of the gap's distance and counted step.
RATE = 0.5


def bce() -> Focus:
    return Focus("BCE", 0.0, 0.0, 0.0)


def focal(gamma: float) -> Focus:
    return Focus("focal", gamma, gamma, 0.0)


def asl(gamma_neg: float, gamma_pos: float, clip: float) -> Focus:
    return Focus("ASL", gamma_neg, gamma_pos, clip)


ASL_DEFAULT = asl(4.0, 1.0, 0.05)


def adaptive(start: Focus, target_gap: float) -> Focus:
    return dataclasses.replace(start, target_gap=target_gap)


def to_train(options: argparse.Namespace) -> list[Focus]:
    """The losses that the command line asks for, in order."""
    given = (options.gamma_neg, options.gamma_pos, options.clip)
    default = (ASL_DEFAULT.gamma_neg, ASL_DEFAULT.gamma_pos, ASL_DEFAULT.clip)
    asymmetric = asl(*(d if g is None else g for g, d in zip(given, default, strict=True)))
    losses = {
        "bce": bce(),
        "focal": focal(options.focal_gamma),
        "asl": asymmetric,
        "adaptive": adaptive(asymmetric, options.target_gap),
    }
    return list(losses.values()) if options.loss == "all" else [losses[options.loss]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The classifier's shape.

    Attributes:
      labels: outputs, one a phenotypic abnormality.
      buckets: rows of the embedding; row 0 is padding.
      width: of the embedding and of the hidden layer.
      features: feature ids a disease, the rest padding; 48 holds 99.9 % of the diseases whole.
      dropout: share of hidden units left out in training.
      fused_head: whether the head is trained without its logits. The parameters are the same.
    """

    labels: int
    buckets: int = 2**15
    width: int = 256
    features: int = 48
    dropout: float = 0.4
    fused_head: bool = False


def head_bias(choice: str | float, counts: np.ndarray, diseases: int, focus: Focus) -> np.ndarray:
    """The head's first bias, float32 (labels,).

    Args:
      choice: "label" for the loss's own optimum at each label's rate, where a classifier that knows the rates alone
        would end; "overall" for that at the mean rate over all labels; "log-odds" for cross-entropy's optimum at each
        label's rate, whatever the loss; or a number for every label.
      counts: how many of the training diseases have each label.
      diseases: how many training diseases there are.
      focus: of the loss.
    """
    overall = counts.mean() / diseases
    # One imaginary disease with the mean rate: a label that no training disease has would start at -infinity.
    rates = (counts + overall) / (diseases + 1)
    if choice == "overall":
        rates = np.full(len(counts), overall)
    elif isinstance(choice, (int, float)):
        return np.full(len(counts), choice, np.float32)
    loss = bce().loss if choice == "log-odds" else focus.loss
    return prior_logits(rates, loss).astype(np.float32)
