"""Rows of levels in which every pair occurs."""

from __future__ import annotations

import itertools

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("but_first", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3), (2, 3, 6, 3), (3, 3, 3, 3, 3), (1, 4, 5)])
def test_every_pair_of_levels_occurs_in_few_rows(sizes, but_first):
    factors = [[(f, i) for i in range(n)] for f, n in enumerate(sizes)]
    rows = pairwise(*factors, but_first=but_first)
    met = {pair for row in rows for pair in itertools.combinations(row, 2)}
    asked = [of_factor[but_first:] for of_factor in factors]
    assert all({*itertools.product(a, b)} <= met for a, b in itertools.combinations(asked, 2))
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 2 * largest[0] * largest[1]
