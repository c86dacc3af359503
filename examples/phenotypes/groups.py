"""The split: diseases that are the same one under two names, or share a gene, stay on one side.

OMIM and Orphanet list many diseases twice, and a gene's diseases resemble each other. A split by rows would put
such twins on both sides and measure memory instead of prediction.
"""

import dataclasses

import numpy as np

from phenotypes import data

SPLIT_SEED = 20090914  # its own seed: another training seed must not move a disease to another side
VALIDATION_SHARE = 0.10
TEST_SHARE = 0.15

_ROMAN = {"ii": "2", "iii": "3", "iv": "4", "vi": "6", "vii": "7", "viii": "8", "ix": "9"}
_GENERIC = {"disease", "syndrome", "type"}


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices of the diseases on each side, int64 and sorted."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def normalised(name: str) -> str:
    """What two catalogues' names of one disease have in common.

    Case, punctuation, word order, generic words and the way a number is written (IV or 4) go: "Long QT syndrome,
    type II" and "Long QT 2" are the same. A lone I, V or X is left, for it may mean X-linked or factor V.
    """
    found = {_ROMAN.get(word, word) for word in data.words(name)}
    return " ".join(sorted(found - _GENERIC or found))


def group_ids(diseases: data.Diseases) -> np.ndarray:
    """A number for each disease, int64; equal for two diseases joined by a chain of shared names and genes."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for disease, name, genes in zip(diseases.ids, diseases.names, diseases.genes, strict=True):
        for bond in (f"name {normalised(name)}", *(f"gene {gene}" for gene in genes)):
            parent[root(bond)] = root(f"disease {disease}")
    _, numbers = np.unique([root(f"disease {disease}") for disease in diseases.ids], return_inverse=True)
    return numbers


def some(diseases: data.Diseases, groups: np.ndarray, count: int) -> tuple[data.Diseases, np.ndarray]:
    """At most `count` diseases drawn at random (always the same), with the groups they have among all; every label."""
    kept = np.sort(np.random.default_rng(SPLIT_SEED).permutation(len(diseases))[:count])
    part = dataclasses.replace(
        diseases,
        ids=[diseases.ids[i] for i in kept],
        names=[diseases.names[i] for i in kept],
        genes=[diseases.genes[i] for i in kept],
        positives=[diseases.positives[i] for i in kept],
    )
    return part, np.unique(groups[kept], return_inverse=True)[1]


def split(groups: np.ndarray) -> Split:
    """Deals whole groups to validation and test at random; the largest group and the rest train.

    Genes chain a third of all diseases into one group. Whichever side it stood on would be that group and little
    else, so it trains.
    """
    sizes = np.bincount(groups)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(sizes))
    order = order[order != np.argmax(sizes)]
    dealt = np.cumsum(sizes[order]) / len(groups)
    side = np.full(len(sizes), "train", dtype="U10")
    side[order[dealt <= VALIDATION_SHARE + TEST_SHARE]] = "test"
    side[order[dealt <= VALIDATION_SHARE]] = "validation"
    return Split(*(np.flatnonzero(side[groups] == name) for name in ("train", "validation", "test")))
