"""What a classifier has to beat: the commonest labels for everyone, and the labels of the most similar names."""

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from phenotypes import data

NEIGHBOURS = 10


def popularity(counts: np.ndarray, diseases: int) -> np.ndarray:
    """Every disease gets the labels' counts among the training diseases: a read-only float32 (diseases, labels)."""
    return np.broadcast_to(counts.astype(np.float32), (diseases, len(counts)))


def nearest_neighbours(
    diseases: data.Diseases, train: np.ndarray, queries: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Labels of the 10 training diseases with the most similar features, float32 (queries, labels).

    TF-IDF over the classifier's own features before hashing, cosine similarity, each neighbour's labels weighted by
    its similarity. Popularity breaks ties, above all among the labels that no neighbour has.
    """

    def documents(indices: np.ndarray) -> list[list[str]]:
        return [data.features(diseases.names[i], diseases.genes[i]) for i in indices]

    tfidf = TfidfVectorizer(analyzer=lambda features: features, sublinear_tf=True)
    neighbours = min(NEIGHBOURS, len(train))
    index = NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(tfidf.fit_transform(documents(train)))
    distances, places = index.kneighbors(tfidf.transform(documents(queries)))

    ends = np.arange(0, places.size + 1, neighbours)
    weights = scipy.sparse.csr_array(
        ((1 - distances).ravel().astype(np.float32), places.ravel(), ends), shape=(len(queries), len(train))
    )
    positives = [diseases.positives[i] for i in train]
    ends = np.cumsum([0, *(len(ids) for ids in positives)])
    labels = scipy.sparse.csr_array(
        (np.ones(ends[-1], np.float32), np.concatenate(positives), ends), shape=(len(train), len(counts))
    )
    return (weights @ labels).toarray() + np.float32(1e-6) * (counts / counts.max()).astype(np.float32)
