"""Which derivatives there are: by any choice of arguments, one after the other, and after a refusal as before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asl_pallas import asymmetric_loss, linear_asymmetric_loss
from reference import float64

ROWS = CLASSES = DEPTH = 5  # alike, so that a gradient in another's place would fit


def operands() -> list[Any]:
    random = np.random.default_rng(0)
    return [random.normal(0, 2, (ROWS, CLASSES)).astype(np.float32) for _ in range(2)]


LABELS = np.eye(ROWS, CLASSES, dtype=np.int8)


def loss(x: Any, weights: Any, gamma: Any = 4.0) -> Any:
    return asymmetric_loss(x, LABELS, weights=weights, gamma_neg=gamma, axis=None)


def head(features: Any, kernel: Any, gamma: Any = 4.0) -> Any:
    return linear_asymmetric_loss(features, kernel, LABELS, gamma_neg=gamma, axis=None)


def head_by_example(features: Any, kernel: Any, gamma: Any = 4.0) -> Any:
    return linear_asymmetric_loss(features, kernel, LABELS, gamma_neg=gamma).sum()


def mapped(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: jax.vmap(f)(*(jnp.stack([jnp.asarray(a)] * 2) for a in arguments)).mean()


def scanned(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return jax.lax.scan(lambda sum_, _: (sum_ + f(*arguments) / 2, None), jnp.float32(0), jnp.arange(2))[0]

    return run


TRANSFORMS = {"plain": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint, "vmap": mapped, "scan": scanned}
FUNCTIONS = [loss, head, head_by_example]
CASES = [(loss, transform) for transform in TRANSFORMS]
CASES += [(head, "plain"), (head, "scan"), (head_by_example, "checkpoint"), (head_by_example, "vmap")]


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(("function", "transform"), CASES)
def test_every_choice_of_arguments_gives_the_same_gradients_in_any_order(function, transform):
    """JAX memoises a call's rules: what one choice leaves behind must not be taken for another's."""
    arguments = [jnp.asarray(a) for a in operands()]
    expected = [jax.grad(lambda a, n=n: function(*arguments[:n], a, *arguments[n + 1 :]))(arguments[n]) for n in (0, 1)]
    f = TRANSFORMS[transform](function)
    for outer in (lambda f: f, jax.checkpoint):
        for chosen in ((0,), (0, 1), (1,)):
            found = jax.grad(outer(f), chosen)(*arguments)
            for n, gradient in zip(chosen, found, strict=True):
                np.testing.assert_allclose(gradient, expected[n], rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(("function", "transform"), CASES)
def test_a_refused_derivative_is_refused_again_and_leaves_right_calls_right(function, transform):
    x, other = (jnp.asarray(a) for a in operands())
    expected = jax.grad(function)(x, other)
    name = "asymmetric_loss" if function is loss else "linear_asymmetric_loss"
    f = TRANSFORMS[transform](function)
    of_gamma = rf"^{name} has no derivative with respect to gamma_neg; wrap"
    forward = rf"^{name} has no forward-mode derivative"
    for _ in range(2):
        for wrong in (
            lambda: jax.grad(f, (0, 2))(x, other, 4.0),
            lambda: jax.jit(jax.grad(f, 2))(x, other, 4.0),
        ):
            with pytest.raises(TypeError, match=of_gamma):
                wrong()
        for wrong in (
            lambda: jax.jvp(lambda x: f(x, other, 4.0), (x,), (x,)),
            lambda: jax.jacfwd(f)(x, other, 4.0),
            lambda: jax.jit(jax.jacfwd(f, 1))(x, other, 4.0),
        ):
            with pytest.raises(TypeError, match=forward):
                wrong()
        for right in (f, jax.checkpoint(f), jax.jit(f)):
            np.testing.assert_allclose(jax.grad(right)(x, other, 4.0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_implementation_that_cannot_serve_says_so_every_time(function):
    def by_name(x: Any, other: Any) -> Any:
        if function is loss:
            return asymmetric_loss(x, LABELS, weights=other, implementation="triton", axis=None)
        axis = None if function is head else -1
        return linear_asymmetric_loss(x, other, LABELS, implementation="triton", axis=axis).sum()

    x, other = (jnp.asarray(a) for a in operands())
    for transform in (jax.jit, mapped):
        f = transform(by_name)
        for _ in range(2):
            for wrong in (f, jax.grad(f), jax.jit(jax.grad(jax.checkpoint(f), (0, 1)))):
                with pytest.raises(NotImplementedError, match="needs the platform 'cuda'"):
                    wrong(x, other)
        np.testing.assert_allclose(
            jax.grad(transform(function))(x, other), jax.grad(function)(x, other), rtol=1e-5, atol=1e-6
        )


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("name", ["gamma_neg", "gamma_pos", "clip"])
@pytest.mark.parametrize("forward", [False, True])
def test_a_gradient_has_a_derivative_with_respect_to_a_hyper_parameter(name, forward):
    """As in bilevel optimisation: through a step of gradient descent, against differences in float64."""
    x, direction = operands()
    numbers = {"gamma_neg": 3.0, "gamma_pos": 1.5, "clip": 0.1}

    def slope_along(number: Any) -> Any:
        of_logits = jax.grad(lambda x: asymmetric_loss(x, LABELS, axis=None, **{**numbers, name: number}))
        return jnp.sum(of_logits(jnp.asarray(x)) * direction)

    def true(number: float) -> Any:
        options = {**numbers, name: number}
        return np.sum(float64.gradient(x.astype(np.float64), LABELS, axis=None, **options) * direction)

    found = (jax.jacfwd if forward else jax.grad)(slope_along)(numbers[name])
    rise = (true(numbers[name] + 1e-6) - true(numbers[name] - 1e-6)) / 2e-6
    assert float(found) == pytest.approx(rise, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("of_kernel", [False, True])
def test_the_heads_gradient_has_a_derivative_with_respect_to_gamma(of_kernel):
    features, kernel = operands()
    features /= 4

    def slope(gamma: Any) -> Any:
        return jax.grad(lambda f, w: head(f, w, gamma), int(of_kernel))(jnp.asarray(features), jnp.asarray(kernel))

    def true(gamma: float) -> Any:
        f, w = features.astype(np.float64), kernel.astype(np.float64)
        of_logits = float64.gradient(f @ w, LABELS, axis=None, gamma_neg=gamma)
        return np.sum(f.T @ of_logits if of_kernel else of_logits @ w.T)

    found = jax.grad(lambda gamma: slope(gamma).sum())(4.0)
    assert float(found) == pytest.approx((true(4 + 1e-6) - true(4 - 1e-6)) / 2e-6, rel=1e-4, abs=1e-5)
