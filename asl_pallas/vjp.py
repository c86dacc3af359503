"""The derivative rules, once for the losses of logits and for the head's.

An execution says how a call is carried out and which gradients its kernels give: those of the logits, or of features,
kernel and bias. Kept for the backward pass are these gradients alone, where one pass gives them beside the loss.
Everything else is autodiff of the plain formula: gradients of labels and weights, and second derivatives.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from asl_pallas import residuals


class Outputs(NamedTuple):
    """The losses, None where not asked for, the gradients by name, and sums for statistics, without derivatives."""

    value: Any
    gradients: dict[str, Any]
    sums: Any = None


class Execution(Protocol):
    """How a call is carried out; hashable. `arrays` is a NamedTuple whose fields name what may be differentiated."""

    @property
    def function(self) -> str:
        """What the caller called, for errors."""
        ...

    @property
    def parameters(self) -> tuple[str, ...]:
        """The fields whose gradients the kernels give."""
        ...

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of those that are arrays."""
        ...

    def asking_for(self, value: bool, gradients: tuple[str, ...]) -> Self: ...

    def plain(self) -> Self:
        """The same by the formula in jnp, which JAX can differentiate."""
        ...

    def evaluate(self, arrays: Any) -> Outputs: ...

    def gives_both(self, arrays: Any, wanted: tuple[str, ...]) -> bool:
        """Whether gradients for a cotangent of 1 come from the pass that gives the loss."""
        ...

    def times(self, gradient: Array, cotangent: Array) -> Array:
        """A gradient for a cotangent of 1 as that for another."""
        ...

    def with_cotangent(self, arrays: Any, cotangent: Array) -> Any:
        """The arrays for a pass whose gradients are those for the cotangent."""
        ...


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(execution: Execution, arrays: Any) -> Outputs:
    return execution.evaluate(arrays)


@_run.defjvp
def _run_jvp(execution, primals, tangents):
    """Second derivatives, and first ones that no kernel gives: autodiff of the formula in plain jnp."""
    _, tangents_out = jax.jvp(execution.plain().evaluate, primals, tangents)
    return _run(execution, *primals), tangents_out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss(execution: Execution, arrays: Any) -> tuple[Array, Any]:
    """The losses, whose derivatives with respect to the arrays' fields are the execution's, and sums beside them."""
    found = _run(execution.asking_for(True, ()), arrays)
    return found.value, found.sums


def _forward(execution: Execution, arrays: Any):
    perturbed, arrays = residuals.perturbed(arrays)
    wanted = tuple(name for name in execution.parameters if name in perturbed)
    in_one_pass = bool(wanted) and execution.gives_both(arrays, wanted)
    outputs = _run(execution.asking_for(True, wanted if in_one_pass else ()), arrays)
    nothing = residuals.absent(outputs.value)
    gradients = {name: outputs.gradients.get(name, nothing) for name in execution.parameters}
    keeps_arrays = perturbed - set(execution.parameters) or not in_one_pass
    kept = arrays if keeps_arrays else jax.tree.map(residuals.absent, arrays)
    return (outputs.value, outputs.sums), (gradients, kept, residuals.as_array(perturbed, arrays._fields))


def _backward(execution: Execution, kept, cotangents: tuple[Array, Any]):
    cotangent, _ = cotangents
    if isinstance(cotangent, SymbolicZero):  # of a function of the sums alone
        aval: Any = cotangent.aval
        cotangent = jnp.zeros(aval.shape, aval.dtype)
    gradients, arrays = residuals.present(kept[:2])
    perturbed = set(residuals.from_array(kept[2], arrays._fields))
    if perturbed & {"vectors", "scalars"}:  # here, since JAX doesn't forget that a forward rule has raised
        raise TypeError(
            f"{execution.function} has no derivative with respect to {' or '.join(execution.hyperparameters)}; wrap "
            "the hyper-parameter in jax.lax.stop_gradient"
        )
    wanted = tuple(name for name in execution.parameters if name in perturbed)
    found: dict[str, Any] = dict.fromkeys(arrays._fields)
    if wanted and gradients[wanted[0]] is None:
        by_cotangent = execution.asking_for(False, wanted)
        found.update(_run(by_cotangent, execution.with_cotangent(arrays, cotangent)).gradients)
    else:
        found.update({name: execution.times(gradients[name], cotangent) for name in wanted})
    others = {name: getattr(arrays, name) for name in perturbed if name not in execution.parameters}
    if others:
        plain = execution.plain().asking_for(True, ())
        _, pull_back = jax.vjp(lambda others: plain.evaluate(arrays._replace(**others)).value, others)
        found.update(pull_back(cotangent)[0])
    return (type(arrays)(**found),)


loss.defvjp(_forward, _backward, symbolic_zeros=True)
