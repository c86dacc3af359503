"""What is measured: our implementations, and what their users would use otherwise.

A contender is a function of logits and labels that returns the summed loss; value_and_grad of it is the measured step.
Peers from packages that aren't installed stay in the list and say so.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from asl_pallas import asymmetric_loss, kernels
from profiling import closed_form, targets, torch_peers
from profiling.cases import CPU, FORWARD, GPU, TPU, Case, UnknownName
from reference import autodiff

Total = Callable[[Any, Any], Any]
ASL = "ASL (4, 1, 0.05)"
# The name of a platform in JAX's lowering, by the place that is measured.
_PLATFORM = (
    {CPU: "cpu", GPU: "cuda", TPU: "tpu"} | dict.fromkeys(targets.TPU, "tpu") | dict.fromkeys(targets.CUDA, "cuda")
)


class Unserved(RuntimeError):
    """The contender doesn't take this case, by design; the message says why."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """
    Attributes:
      name: as `--only` takes it.
      title: as tables and plots show it.
      loss: what it computes.
      build: gives the function of (logits, labels) that returns the total.
      implementation: ours by this name; None for a peer.
      package: what has to be installed; torch runs on torch's own tensors.
      absent: what else it needs, and isn't there.
      hard: it takes no soft labels.
      slow: XLA takes long to compile it for a TPU, so --quick leaves it out there.
    """

    name: str
    title: str
    loss: str
    build: Callable[[], Total]
    implementation: str | None = None
    package: str | None = None
    hard: bool = False
    slow: bool = False
    absent: Callable[[], str | None] = lambda: None

    @property
    def ours(self) -> bool:
        return self.implementation is not None

    @property
    def torch(self) -> bool:
        return self.package == "torch"

    @property
    def compiled_by_torch(self) -> bool:
        return self.torch and self.name.endswith("compiled")

    def missing(self, place: str) -> str | None:
        """Why it can't be had here, or None."""
        if self.torch:
            reason = torch_peers.missing() or self.absent()
            return reason or ("this torch sees no GPU" if place == GPU and not torch_peers.has_cuda() else None)
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    def serves(self, place: str) -> bool:
        """Whether it belongs among a place's rows: a kernel of ours on its own platform, torch where it runs."""
        if self.torch:
            return place in (CPU, GPU)
        if self.implementation in (None, "xla"):
            return True
        return kernels.PLATFORMS[self.implementation] == _PLATFORM[place]

    def check(self, case: Case) -> None:
        """Raises Unserved where the contender isn't made for the case."""
        if case.form != "dense" and not self.ours:
            raise Unserved("takes dense labels")
        if case.soft and self.hard:
            raise Unserved("written for hard labels")
        if self.implementation not in (None, "xla"):
            reason = kernels.refusal(self.implementation, case.operands(), case.form)
            if reason:
                raise Unserved(reason)


def step(total: Total, mode: str) -> Total:
    """What is compiled and timed."""
    return total if mode == FORWARD else jax.value_and_grad(total)


def _ours(implementation: str) -> Total:
    return lambda logits, labels: asymmetric_loss(logits, labels, implementation=implementation, axis=None)


def _summed(elementwise: Callable[[Any, Any], Any]) -> Total:
    return lambda logits, labels: elementwise(logits, labels).sum()


def _optax(name: str, **options: Any) -> Total:
    # optax computes in the logits' dtype; in bfloat16 its losses would have two digits.
    import optax

    loss = getattr(optax, name)
    return lambda logits, labels: loss(logits.astype(jnp.float32), labels, **options).sum()


_IMPLEMENTATIONS = (*kernels.LOADS, "xla")
CONTENDERS: tuple[Contender, ...] = (
    *(
        Contender(f"ours-{name}", f"asl_pallas, {name}", ASL, functools.partial(_ours, name), implementation=name)
        for name in _IMPLEMENTATIONS
    ),
    Contender("closed-form", "closed form in jnp", ASL, lambda: closed_form.total_asymmetric_loss, hard=True),
    Contender("both-sides", "both sides in jnp, and a select", ASL, lambda: closed_form.total_of_both_sides, hard=True),
    Contender("official", "official formula in jnp", ASL, lambda: _summed(autodiff.official), slow=True),
    Contender("optax-style", "ASL in optax's style", ASL, lambda: _summed(autodiff.optax_style), slow=True),
    Contender(
        "optax-focal",
        "optax, focal loss",
        "focal loss (2)",
        functools.partial(_optax, "sigmoid_focal_loss", gamma=2.0),
        package="optax",
        slow=True,
    ),
    Contender(
        "optax-bce",
        "optax, cross-entropy",
        "cross-entropy",
        functools.partial(_optax, "sigmoid_binary_cross_entropy"),
        package="optax",
    ),
    Contender("torch-asl", "torch, timm's ASL", ASL, torch_peers.asymmetric, package="torch"),
    Contender(
        "torch-official",
        "torch, the official ASL, optimized",
        ASL,
        torch_peers.official,
        package="torch",
        absent=torch_peers.lacks_official,
    ),
    Contender("torch-asl-compiled", "torch.compile, timm's ASL", ASL, torch_peers.asymmetric_compiled, package="torch"),
    Contender("torch-bce", "torch, cross-entropy", "cross-entropy", torch_peers.cross_entropy, package="torch"),
    Contender(
        "torch-bce-compiled",
        "torch.compile, cross-entropy",
        "cross-entropy",
        torch_peers.cross_entropy_compiled,
        package="torch",
    ),
)


def find(name: str) -> Contender:
    known = {contender.name: contender for contender in CONTENDERS}
    if name not in known:
        raise UnknownName(f"there is no contender {name!r}; there are {', '.join(known)}")
    return known[name]


def select(names: Iterable[str] | None, contenders: Sequence[Contender] = ()) -> tuple[Contender, ...]:
    """The contenders of these names, in the list's order; all of them for None."""
    everyone = tuple(contenders) or CONTENDERS
    if names is None:
        return everyone
    wanted = {find(name).name for name in names}
    return tuple(contender for contender in everyone if contender.name in wanted)


def at(place: str, contenders: Iterable[Contender]) -> tuple[Contender, ...]:
    return tuple(contender for contender in contenders if contender.serves(place))


def default(place: str) -> Contender:
    """The one that `asymmetric_loss` picks by itself at this place: ours, which ratios are taken to."""
    return next(contender for contender in CONTENDERS if contender.ours and contender.serves(place))
