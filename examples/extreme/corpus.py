"""A made-up corpus with a million labels: a Zipf law over the labels, and words that give each of them away.

Every label has four words of its own, drawn at random; with far fewer words than labels, a word is several labels' and
only together do they name one. An example has 3 to 7 labels, drawn independently by the Zipf-Mandelbrot law; a label
shows each of its words with probability 0.8, and 8 words that mean nothing are mixed in. Examples are drawn as they are
needed and never twice, so whatever is predicted for held-out ones is learned and not remembered.
"""

import dataclasses

import numpy as np

PADDING = 0  # the word that is none; its row of the embedding is never looked at
NO_LABEL = -1  # as SparseLabels has it

WORDS_A_LABEL = 4
SHOWN = 0.8
NOISE = 8
FEWEST, MOST = 3, 7  # labels an example
LENGTH = MOST * WORDS_A_LABEL + NOISE  # words an example, absent ones included

# Probability of the label at rank r, from 0: proportional to 1 / (r + SHIFT). Without the shift of Mandelbrot's law
# the commonest few labels would be on a third of the examples, and naming them would look like learning.
SHIFT = 20


@dataclasses.dataclass(frozen=True)
class Batch:
    """words: int32 (examples, LENGTH), padded with PADDING. labels: int32 (examples, MOST), padded with NO_LABEL."""

    words: np.ndarray
    labels: np.ndarray


class Corpus:
    """Which words give each label away, and how often it comes.

    Attributes:
      labels: how many.
      vocabulary: how many words, PADDING among them.
      by_rank: int32 (labels,), the labels from the commonest to the rarest.
      frequencies: float64 (labels,), the share of the examples that have each label.
    """

    def __init__(self, labels: int, vocabulary: int, seed: int):
        self.labels = labels
        self.vocabulary = vocabulary
        rng = np.random.default_rng([seed, 0])
        self.by_rank = rng.permutation(labels).astype(np.int32)
        self._words = rng.integers(1, vocabulary, (labels, WORDS_A_LABEL), np.int32)
        share = 1 / (np.arange(labels) + SHIFT)
        share /= share.sum()
        self._cumulative = np.cumsum(share)
        self.frequencies = np.empty(labels)
        # A label that is drawn twice for an example is on it once.
        counts = np.arange(FEWEST, MOST + 1)
        self.frequencies[self.by_rank] = np.mean([-np.expm1(n * np.log1p(-share)) for n in counts], axis=0)

    def draw(self, rng: np.random.Generator, examples: int) -> Batch:
        ranks = np.searchsorted(self._cumulative, rng.random((examples, MOST)), side="right")
        labels = self.by_rank[np.minimum(ranks, self.labels - 1)]  # the last sum may be a rounding below 1
        counts = rng.integers(FEWEST, MOST + 1, (examples, 1))
        absent = np.arange(MOST) >= counts
        words = self._words[labels]
        silent = absent[..., None] | (rng.random(words.shape) >= SHOWN)
        words = np.where(silent, PADDING, words).reshape(examples, -1)
        noise = rng.integers(1, self.vocabulary, (examples, NOISE), np.int32)
        return Batch(np.concatenate([words, noise], axis=1), np.where(absent, NO_LABEL, labels))


def precision_at(k: int, ranked: np.ndarray, labels: np.ndarray) -> float:
    """The share of right ones among the first k of each example's ranked labels (examples, >= k)."""
    return float((ranked[:, :k, None] == labels[:, None, :]).any(axis=2).mean())
