"""Every loss of the family compiled for TPUs and an H100: one kernel, nothing as large as the logits, few bundles."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compiled import CHIPS, FEW, S, available, holds_kernel, kernel_of

from asl_pallas import PartialLabels, linear_multilabel_loss, losses, multilabel_loss
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss, FocalLoss, HillLoss, SelectiveLoss
from profiling import own_loss, targets

NAMES = [name for name in losses.__all__ if name.endswith(("Loss", "Entropy")) and name != "ElementwiseLoss"]
SHAPE = (4096, 8192)
LOGITS, LABELS = S(SHAPE, jnp.bfloat16), S(SHAPE, jnp.int8)


@dataclasses.dataclass(frozen=True)
class Hill(ElementwiseLoss):
    """HillLoss's value alone, so that its slope comes by autodiff inside the kernel."""

    def value(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return HillLoss().value(logit, label) if ops is None else HillLoss().value(logit, label, ops)


TRACED = AsymmetricLoss(jnp.float32(4), jnp.float32(1), jnp.float32(0.05))
PER_CLASS = AsymmetricLoss(*(np.full(SHAPE[1], number, np.float32) for number in (4, 1, 0.05)))


@pytest.fixture(params=CHIPS)
def target(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_of_every_loss_are_one_kernel(name, target):
    loss = getattr(losses, name)()
    step = jax.value_and_grad(lambda x, y: multilabel_loss(loss, x, y, implementation=kernel_of(target)).sum())
    compiled = targets.compile_for(target, step, LOGITS, LABELS)
    assert holds_kernel(target, compiled)
    assert len(re.findall(r"= .*custom-call\(", compiled.as_text())) == 1
    assert targets.temporary_bytes(compiled) <= FEW


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("loss", [PER_CLASS, FocalLoss(np.linspace(0, 4, SHAPE[1], dtype=np.float32))], ids=str)
def test_a_value_per_class_is_read_by_the_kernel(loss, target):
    step = jax.value_and_grad(lambda loss, x, y: multilabel_loss(loss, x, y).sum(), argnums=1)
    shapes = jax.tree.map(lambda a: S(a.shape, a.dtype), loss)
    compiled = targets.compile_for(target, step, shapes, LOGITS, LABELS)
    assert holds_kernel(target, compiled)
    assert targets.temporary_bytes(compiled) <= FEW


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("form", ["dense", "packed", "sparse"])
def test_three_states_are_read_in_every_form(form, target):
    random = np.random.default_rng(0)
    states = np.where(random.random((64, SHAPE[1])) < 0.99, -1, random.integers(0, 2, (64, SHAPE[1]))).astype(np.int8)
    example = states if form == "dense" else PartialLabels.from_dense(states, form=form)
    labels = jax.tree.map(lambda a: S((SHAPE[0], *a.shape[1:]), a.dtype), example)
    step = jax.value_and_grad(lambda x, y: multilabel_loss(SelectiveLoss(), x, y).sum())
    compiled = targets.compile_for(target, step, LOGITS, labels)
    assert holds_kernel(target, compiled)
    assert targets.temporary_bytes(compiled) <= FEW


@pytest.mark.long
def test_the_head_of_any_loss_has_no_logits_in_memory():
    features, kernel = S((512, 256), jnp.bfloat16), S((256, 65_536), jnp.bfloat16)
    labels = S((512, 65_536), jnp.int8)
    for name in NAMES:
        loss = getattr(losses, name)()

        def step(f: Any, w: Any, y: Any, loss: Any = loss) -> Any:
            return linear_multilabel_loss(loss, f, w, y, axis=None)

        compiled = targets.compile_for(available("v5e"), jax.value_and_grad(step, (0, 1)), features, kernel, labels)
        assert holds_kernel("v5e", compiled)
        assert targets.temporary_bytes(compiled) <= 2 * 512 * 65_536 / 4, name


# Bundles per 1024 elements on v5e. The formula that is written: at most 16 for Hill and focal; by autodiff: at most 30.
BUNDLES = {
    **{"AsymmetricLoss": 12.0, "BinaryCrossEntropy": 11.6, "FocalLoss": 10.5, "HillLoss": 12.5, "SelfPacedLoss": 10.5},
    **{"AsymmetricPolynomialLoss": 20.0, "SelectiveLoss": 30.0, "VarifocalLoss": 30.0},
}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_on_v5e_a_loss_takes_few_bundles(name):
    cost = own_loss.cost(f"asl_pallas.losses:{name}", available("v5e"))
    assert cost.bundles_per_1024 <= BUNDLES[name]
    assert cost.temporary_bytes == 0


@pytest.mark.long
def test_autodiff_inside_the_kernel_and_a_value_per_class_cost_few_bundles_more():
    available("v5e")
    assert own_loss.cost("test_family_compiled:Hill", "v5e").bundles_per_1024 <= 30
    of_scalars, of_vectors = (
        own_loss.cost(f"test_family_compiled:{name}", "v5e").bundles_per_1024 for name in ("TRACED", "PER_CLASS")
    )
    assert of_vectors <= of_scalars + 2


def test_a_value_written_with_a_backends_operations_is_differentiated_in_its_kernel(target):
    """Whose instructions have no derivative of their own."""
    step = jax.value_and_grad(lambda x, y: multilabel_loss(Hill(), x, y, implementation=kernel_of(target)).sum())
    compiled = targets.compile_for(target, step, LOGITS, LABELS)
    assert holds_kernel(target, compiled)
    assert targets.temporary_bytes(compiled) <= FEW


def test_the_tool_for_ones_own_loss_prints_errors_and_bundles(capsys):
    assert own_loss.main(["asl_pallas.losses:FocalLoss"]) == 0
    said = capsys.readouterr().out
    assert "mosaic_tpu" in said and "beyond" not in said
    with pytest.raises(TypeError, match="expected a loss object or its class"):
        own_loss.find("jax:jit")
