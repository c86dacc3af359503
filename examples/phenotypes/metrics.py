"""How good a ranking of the labels is: precision at k and average precision."""

import dataclasses

import numpy as np
import sklearn.metrics


@dataclasses.dataclass(frozen=True)
class Scores:
    """Metrics between 0 and 1. Of rankings, higher is better.

    Attributes:
      f1: micro F1 at the threshold that is best on other examples; None of a ranking alone, as the next two.
      sigmoid_error, link_error: the expected calibration error of the scores' sigmoid, and of the probability that they
        stand for by the loss's link. Lower is better.
    """

    precision_at_1: float
    precision_at_5: float
    micro_average_precision: float
    macro_average_precision: float
    f1: float | None = None
    sigmoid_error: float | None = None
    link_error: float | None = None


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


def best_threshold(scores: np.ndarray, labels: np.ndarray, bins: int = 4096) -> float:
    """The score from which on to call a label present for the highest micro F1, to a bin's width.

    scikit-learn's precision_recall_curve would sort every pair for it.
    """
    edges = np.linspace(scores.min(), scores.max(), bins + 1)
    of_positives, _ = np.histogram(scores[labels > 0], edges)
    of_all, _ = np.histogram(scores, edges)
    true, called = (np.cumsum(counts[::-1])[::-1] for counts in (of_positives, of_all))
    return float(edges[np.argmax(2 * true / (called + true[0]))])


def micro_f1(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Of all (disease, label) pairs with these scores or more."""
    called = scores >= threshold
    return float(2 * np.count_nonzero(called & (labels > 0)) / (called.sum() + np.count_nonzero(labels)))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Of the pairs in each bin: the mean of the predicted probabilities, the share of positives, and how many."""

    predicted: np.ndarray
    observed: np.ndarray
    pairs: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of both over all pairs, bin by bin."""
        distance = np.abs(self.predicted - self.observed)
        return float(np.sum(distance * self.pairs) / np.sum(self.pairs))


def reliability(probabilities: np.ndarray, labels: np.ndarray, edges: np.ndarray | None = None) -> Reliability:
    """By bins of the predicted probability: 15 of one width, as in most papers, or other ones. Empty bins are left out.

    Reference: Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, equation (3).
    """
    edges = np.linspace(0, 1, 16) if edges is None else edges
    bins = np.clip(np.searchsorted(edges, probabilities.ravel(), side="right") - 1, 0, len(edges) - 2)
    pairs, predicted, positives = (
        np.bincount(bins, weights, len(edges) - 1) for weights in (None, probabilities.ravel(), labels.ravel())
    )
    there = pairs > 0
    return Reliability(predicted[there] / pairs[there], positives[there] / pairs[there], pairs[there])


def evaluate(scores: np.ndarray, labels: np.ndarray) -> Scores:
    """Metrics of the ranking that scores (rows, labels) give, against 0/1 labels of the same shape."""
    return Scores(
        precision_at_1=precision_at(1, scores, labels),
        precision_at_5=precision_at(5, scores, labels),
        micro_average_precision=micro_average_precision(scores, labels),
        macro_average_precision=macro_average_precision(scores, labels),
    )
