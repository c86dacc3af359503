"""How good a ranking of the labels is: precision at k and average precision."""

import dataclasses

import numpy as np
import sklearn.metrics


@dataclasses.dataclass(frozen=True)
class Scores:
    """Metrics between 0 and 1, higher is better."""

    precision_at_1: float
    precision_at_5: float
    micro_average_precision: float
    macro_average_precision: float


def precision_at(k: int, scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of positives among each row's k highest scores, averaged over the rows.

    scikit-learn has it for one positive a row only (top_k_accuracy_score); its precision_score with
    average="samples" would need a 0/1 matrix of the k highest as large as the labels.
    """
    highest = np.argpartition(scores, -k, axis=1)[:, -k:]
    return float(np.take_along_axis(labels, highest, axis=1).mean())


def micro_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of all (disease, label) pairs in one ranking."""
    return float(sklearn.metrics.average_precision_score(labels.ravel(), scores.ravel()))


def macro_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision of each label's ranking of the diseases, averaged over the labels that have a positive.

    Of a label without positives average precision isn't defined (scikit-learn says 0, with a warning).
    """
    present = np.flatnonzero(labels.any(axis=0))
    # np.take keeps the rows contiguous, labels[:, present] doesn't: scikit-learn took 60 s there, 2 s here.
    labels, scores = np.take(labels, present, axis=1), np.take(scores, present, axis=1)
    return float(sklearn.metrics.average_precision_score(labels, scores, average="macro"))


def evaluate(scores: np.ndarray, labels: np.ndarray) -> Scores:
    """All four metrics of scores (rows, labels) against 0/1 labels of the same shape."""
    return Scores(
        precision_at_1=precision_at(1, scores, labels),
        precision_at_5=precision_at(5, scores, labels),
        micro_average_precision=micro_average_precision(scores, labels),
        macro_average_precision=macro_average_precision(scores, labels),
    )
