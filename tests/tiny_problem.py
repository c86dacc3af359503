"""A problem of the example's kind that trains in a second. Whoever imports this has examples/ on the path."""

import numpy as np

from phenotypes import data, groups, settings, training


def tiny_problem(diseases: int, labels: int) -> training.Problem:
    rng = np.random.default_rng(0)
    found = data.Diseases(
        ids=[f"OMIM:{i}" for i in range(diseases)],
        names=[f"disease {i} of {i % 7}" for i in range(diseases)],
        genes=[()] * diseases,
        positives=[np.sort(rng.permutation(labels)[:3]).astype(np.int32) for _ in range(diseases)],
        labels=[f"HP:{i}" for i in range(labels)],
        release="2001-02-03",
    )
    sizes = settings.Sizes(labels=labels, buckets=512, width=8)
    return training.Problem(
        diseases=found,
        split=groups.split(np.arange(diseases)),
        sizes=sizes,
        ids=data.feature_ids(found, buckets=sizes.buckets, length=sizes.features),
        counts=np.ones(labels),
    )
