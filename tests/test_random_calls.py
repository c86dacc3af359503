"""A share of the random calls that `python -m tests.random_calls --calls 100000` makes."""

from __future__ import annotations

import pytest
import random_calls


@pytest.mark.long
def test_random_calls_match_float64(capsys):
    status = random_calls.main(["--calls", "2000", "--seed", "2026"])
    assert status == 0, capsys.readouterr().out
