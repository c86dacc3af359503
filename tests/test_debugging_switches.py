"""Whatever switch of JAX a user debugs with, every call goes through and says the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, linear_asymmetric_loss, linear_top_k

ROWS, CLASSES, DEPTH = 6, 20, 5
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (ROWS, CLASSES)).astype(np.float32)
LABELS = (RANDOM.random((ROWS, CLASSES)) < 0.3).astype(np.int8)
FEATURES, KERNEL = (RANDOM.normal(0, 1, s).astype(np.float32) for s in ((ROWS, DEPTH), (DEPTH, CLASSES)))
BIAS, WEIGHTS, POS_WEIGHT = (RANDOM.random(s).astype(np.float32) for s in (CLASSES, (ROWS, 1), CLASSES))
WHERE = RANDOM.random((ROWS, CLASSES)) < 0.8
FORMS: dict[str, Callable[[Any], Any]] = {
    "bool": lambda y: jnp.asarray(y, bool),
    "int8": jnp.asarray,
    "soft": lambda y: jnp.asarray(y * 0.75, jnp.float32),
    "packed": lambda y: jax.tree.map(jnp.asarray, PackedLabels.from_dense(y)),
    "sparse": lambda y: jax.tree.map(jnp.asarray, SparseLabels.from_dense(y)),
}


def loss(x: Any, y: Any, arrays: dict[str, Any], gamma: Any) -> Any:
    return asymmetric_loss(x, y, gamma_neg=gamma, **arrays).sum()


def losses_per_element(x: Any, y: Any, arrays: dict[str, Any], gamma: Any) -> Any:
    return asymmetric_loss(x, y, axis=(), gamma_neg=gamma, **arrays).sum()


def losses_per_class(x: Any, y: Any, arrays: dict[str, Any], gamma: Any) -> Any:
    return asymmetric_loss(x, y, axis=0, gamma_neg=gamma, **arrays).sum()


def head(x: Any, y: Any, arrays: dict[str, Any], gamma: Any) -> Any:
    features, kernel, bias = x
    return linear_asymmetric_loss(features, kernel, y, bias=bias, chunk_size=8, gamma_neg=gamma, **arrays).sum()


def head_total(x: Any, y: Any, arrays: dict[str, Any], gamma: Any) -> Any:
    features, kernel, bias = x
    return linear_asymmetric_loss(features, kernel, y, bias=bias, axis=None, gamma_neg=gamma, **arrays)


OF_LOGITS = (loss, losses_per_element, losses_per_class)
FUNCTIONS = (*OF_LOGITS, head, head_total)


def arguments(function: Any, form: str) -> tuple[Any, ...]:
    """On the device, and there before any switch is set."""
    x: Any = jnp.asarray(LOGITS) if function in OF_LOGITS else tuple(map(jnp.asarray, (FEATURES, KERNEL, BIAS)))
    arrays = {"where": jnp.asarray(WHERE), "weights": jnp.asarray(WEIGHTS), "pos_weight": jnp.asarray(POS_WEIGHT)}
    return x, FORMS[form](LABELS), arrays, jnp.float32(3)


def results(function: Any, form: str, jit: bool, *given: Any) -> Any:
    """Value and gradient, and the gradient of what else has one."""
    step = jax.value_and_grad(function, argnums=0)
    of_weights = jax.grad(lambda arrays, x, y, where, gamma: function(x, y, arrays | {"where": where}, gamma))
    x, y, arrays, gamma = given

    def both(x: Any, y: Any, arrays: Any, gamma: Any) -> Any:
        weights = {name: arrays[name] for name in ("weights", "pos_weight")}
        return step(x, y, arrays, gamma), of_weights(weights, x, y, arrays["where"], gamma)

    return (jax.jit(both) if jit else both)(x, y, arrays, gamma)


@contextlib.contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    config: Any = jax.config
    before = getattr(config, name)
    config.update(name, value)
    try:
        yield
    finally:
        config.update(name, before)


@contextlib.contextmanager
def strict_in_64_bits():
    """Where an index of JAX's own has another width than one of ours."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


SWITCHES: dict[str, Callable[[], Any]] = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "checking_leaks": jax.checking_leaks,
    "log_compiles": jax.log_compiles,
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "enable_checks": lambda: setting("jax_enable_checks", True),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "x64": lambda: jax.enable_x64(True),
    "strict in x64": strict_in_64_bits,
    "traceback filtering": lambda: setting("jax_traceback_filtering", "off"),
    "no traceback in locations": lambda: setting("jax_include_full_tracebacks_in_locations", False),
}


# Switches that every operation meets go with every function and form, others with loss and head and the three forms.
OF_OPERATIONS = ("disable_jit", "debug_nans", "strict dtype promotion", "rank promotion", "x64", "strict in x64")
FEW = [(loss, "int8"), (loss, "packed"), (head, "sparse")]
MORE = [
    *((losses_per_element, "bool"), (losses_per_class, "soft"), (loss, "sparse")),
    *((head_total, "packed"), (head, "int8")),
]
CASES = [(switch, *case) for switch in SWITCHES for case in (FEW + MORE if switch in OF_OPERATIONS else FEW)]


@functools.cache
def expected_results(function: Any, form: str) -> Any:
    return results(function, form, True, *arguments(function, form))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("switch", "function", "form"), CASES)
def test_a_debugging_switch_changes_no_result(switch, function, form):
    given, expected = arguments(function, form), expected_results(function, form)
    # Without jit JAX's own jax.grad moves a number to the device, and looking for leaks takes minutes.
    jits = {"disable_jit": (False,), "transfer_guard": (True,), "checking_leaks": (True,)}.get(switch, (False, True))
    for jit in jits:
        with SWITCHES[switch]():
            found = jax.block_until_ready(results(function, form, jit, *given))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_debugging_switch_changes_no_label(switch):
    features, kernel, bias = (jnp.asarray(a) for a in (FEATURES, KERNEL, BIAS))
    run = jax.jit(lambda *a: linear_top_k(a[0], a[1], 3, bias=a[2], chunk_size=8))
    expected = run(features, kernel, bias)
    with SWITCHES[switch]():
        found = run(features, kernel, bias)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("function", [loss, head_total])
@pytest.mark.parametrize("jit", [False, True])
def test_debug_nans_names_a_nan_in_a_sentence(function, jit):
    """It was a RecursionError, and 210 lines of operations run one by one."""
    x, y, arrays, gamma = arguments(function, "int8")
    x = jax.tree.map(lambda a: a.at[0].set(jnp.nan), x)
    step = jax.value_and_grad(function)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        (jax.jit(step) if jit else step)(x, y, arrays | {"where": jnp.ones_like(arrays["where"])}, gamma)


def test_a_compilation_cache_serves_a_second_process_of_the_same_call():
    """Its key comes from the lowered program, which therefore has to be the same every time."""
    x, y = jnp.asarray(LOGITS), jnp.asarray(LABELS)

    def text() -> str:
        jax.clear_caches()
        return jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y).sum())).lower(x, y).as_text()

    assert text() == text()
