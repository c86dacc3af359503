"""Rows of levels in which every pair of levels occurs: far fewer than all rows, which a product of factors has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Level = tuple[int, int]  # which factor, and which of its levels


def pairwise(*factors: Iterable[Any], but_first: bool = False) -> list[tuple[Any, ...]]:
    """Chosen greedily, and always the same. `but_first`: pairs with a factor's first level need not occur."""
    levels: list[Sequence[Any]] = [tuple(factor) for factor in factors]
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(levels)), 2)
        for i, j in itertools.product(*(range(but_first, len(levels[f])) for f in (a, b)))
    }
    rows = []
    while missing:
        row: dict[int, Level] = {level[0]: level for level in min(missing)}
        for factor, of_factor in enumerate(levels):
            if factor not in row:
                choices = [(factor, i) for i in range(len(of_factor))]
                row[factor] = max(choices, key=lambda level: _newly_met(row, level, missing))
        in_order = [row[factor] for factor in range(len(levels))]
        missing -= set(itertools.combinations(in_order, 2))
        rows.append(tuple(levels[factor][i] for factor, i in in_order))
    return rows


def _newly_met(row: dict[int, Level], level: Level, missing: set[tuple[Level, Level]]) -> int:
    return sum((min(level, other), max(level, other)) in missing for other in row.values())
