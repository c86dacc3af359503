"""The checked mode, which looks at labels that are traced."""

from __future__ import annotations

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from asl_pallas import SparseLabels, asymmetric_loss, checked_labels, label_checks, linear_asymmetric_loss

GOOD = np.array([[0, 1, 0], [1, 0, 0]], np.int8)
X = np.ones((2, 3), np.float32)


def loss(x: Any, y: Any, **options: Any) -> Any:
    return asymmetric_loss(x, y, **options).sum()


def head(x: Any, y: Any, **options: Any) -> Any:
    return linear_asymmetric_loss(x, jnp.eye(3), y, axis=None, **options)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("function", [loss, head])
@pytest.mark.parametrize(
    ("bad", "options", "says"),
    [
        (np.int8(2), {}, "labels hold 2; expected 0 or 1"),
        (np.int8(-1), {}, "labels hold -1; expected 0 or 1"),
        (np.uint8(255), {"ignore_label": 254}, "labels hold 255; expected 0 or 1, or ignore_label=254"),
        (np.float32(1.5), {}, "labels hold 1.5; expected between 0 and 1"),
        (np.int8(-1), {"ignore_label": -1}, None),
        (np.int8(2), {"where": np.array([[True], [False]])}, None),
        (np.int8(1), {}, None),
    ],
)
def test_traced_labels_are_looked_at_and_nothing_else_changes(function, bad, options, says):
    y = GOOD.astype(bad.dtype)
    y[1, 2] = bad
    step = jax.jit(jax.value_and_grad(lambda x, y: function(x, y, **options)))
    expected = step(X, y)  # compiled without the check
    with checked_labels():
        error, found = checkify.checkify(step)(X, y)
    assert (error.get() is None) == (says is None)
    assert says is None or error.get().startswith(says)
    np.testing.assert_array_equal(found[1], expected[1])
    error, _ = checkify.checkify(step)(X, y)  # nor afterwards
    assert error.get() is None


def test_traced_ids_are_looked_at():
    def step(ids: Any) -> Any:
        return asymmetric_loss(X, SparseLabels(ids, 3)).sum()

    for ids, says in (([[0, -1], [2, 3]], "ids hold 3; expected 0 <= id < 3"), ([[0, -1], [2, 1]], None)):
        with checked_labels():
            error, _ = jax.jit(checkify.checkify(step))(jnp.array(ids))
        assert (error.get() or "").startswith(says or "") and (error.get() is None) == (says is None)


def test_a_check_that_nobody_asks_checkify_for_is_an_error_and_not_silent():
    with checked_labels(), pytest.raises(ValueError, match="checkify"):
        jax.jit(loss)(X, GOOD)


def test_the_docstrings_example_runs():
    assert doctest.testmod(label_checks).attempted > 0
    assert doctest.testmod(label_checks).failed == 0
