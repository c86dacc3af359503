"""Statistics compiled for TPUs and an H100: in the one kernel, for a few bundles, nothing as large as the logits."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_compiled import CHIPS, FEW, S, available, holds_kernel, kernel_of

from asl_pallas import AsymmetricLoss, PackedLabels, linear_multilabel_loss, multilabel_loss
from asl_pallas.bits import words_for
from asl_pallas.losses import FocalLoss, HillLoss, SelectiveLoss
from profiling import own_loss, targets

SHAPE = (4096, 8192)
LOGITS, LABELS = S(SHAPE, jnp.bfloat16), S(SHAPE, jnp.int8)
# Bytes: ten sums of 4096 rows, some of them by spans of the classes.
OF_ROWS = 64 * 4096 * 4
LOSSES = [AsymmetricLoss(), FocalLoss(2.0, 0.25), HillLoss(), SelectiveLoss(clip=0.05)]


@pytest.fixture(params=CHIPS)
def target(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("form", ["dense", "packed", "soft"])
def test_they_come_from_the_kernel_that_gives_loss_and_gradient(loss, form, target):
    labels = {
        "dense": LABELS,
        "packed": jax.tree.unflatten(
            jax.tree.structure(PackedLabels.from_ids([[0]], SHAPE[1])), [S((SHAPE[0], words_for(SHAPE[1])), jnp.uint32)]
        ),
        "soft": S(SHAPE, jnp.bfloat16),
    }[form]
    step = own_loss.step(loss, statistics=True, implementation=kernel_of(target))
    compiled = targets.compile_for(target, step, LOGITS, labels)
    assert holds_kernel(target, compiled)
    assert len(re.findall(r"= .*custom-call\(", compiled.as_text())) == 1
    assert targets.temporary_bytes(compiled) <= OF_ROWS


@pytest.mark.long
def test_on_v5e_they_cost_few_bundles_and_spill_nothing():
    """12.0 without, and 3.5 more at most."""
    cost = own_loss.cost("asl_pallas.losses:AsymmetricLoss", available("v5e"), statistics=True)
    assert cost.bundles_per_1024 <= 12.0 + 3.5
    assert cost.spills == 0
    assert cost.temporary_bytes <= OF_ROWS


@pytest.mark.long
def test_on_an_h100_nothing_spills_and_loads_are_as_wide():
    available("h100")
    step = own_loss.step(AsymmetricLoss(), statistics=True, implementation="triton")
    (kernel,) = (one for one in targets.resources("h100", step, LOGITS, LABELS) if one.name.startswith("asl_pallas"))
    assert kernel.spilled_bytes == 0
    assert kernel.loads == (16, 8)
    assert kernel.registers <= 128


@pytest.mark.long
def test_the_head_has_them_without_logits_in_memory():
    features, kernel, labels = S((512, 256), jnp.bfloat16), S((256, 65_536), jnp.bfloat16), S((512, 65_536), jnp.int8)

    def step(f: Any, w: Any, y: Any) -> Any:
        return linear_multilabel_loss(AsymmetricLoss(), f, w, y, axis=None, statistics=True)

    compiled = targets.compile_for(
        available("v5e"), jax.value_and_grad(step, (0, 1), has_aux=True), features, kernel, labels
    )
    assert holds_kernel("v5e", compiled)
    assert targets.temporary_bytes(compiled) <= 2 * 512 * 65_536 / 4


def test_a_program_that_doesnt_ask_has_nothing_of_them(target):
    def step(**options: Any) -> Any:
        return jax.value_and_grad(
            lambda x, y: multilabel_loss(AsymmetricLoss(), x, y, implementation=kernel_of(target), **options).sum()
        )

    texts = [
        re.sub(r"metadata=\{[^}]*\}", "", targets.compile_for(target, step(**options), LOGITS, LABELS).as_text())
        for options in ({}, {"statistics": False})
    ]
    assert "gradient_and_statistics" not in texts[0]
    assert len(texts[0]) == len(texts[1])
    assert targets.temporary_bytes(targets.compile_for(target, step(), LOGITS, LABELS)) <= FEW
