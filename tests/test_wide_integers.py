"""Kernels where JAX counts in 64 bits, and arrays of more elements than 32 bits count."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from pairwise import pairwise
from test_compiled import available, few_labels, holds_kernel, kernel_of

from asl_pallas import asymmetric_loss, kernels, linear_asymmetric_loss
from asl_pallas.kernels.tile import Operands
from profiling import targets

S = jax.ShapeDtypeStruct
FORMS = ("int8", "bool", "float32", "int64", "packed", "sparse")


def labels(form: str, shape: tuple[int, ...]) -> Any:
    return few_labels(form, shape, min(shape[-1], 20)) if form in ("packed", "sparse") else S(shape, jnp.dtype(form))


def plain(x: Any, y: Any, gamma: Any, clip: Any, weights: Any, where: Any, name: str) -> Any:
    return jax.value_and_grad(lambda x: asymmetric_loss(x, y, implementation=name).sum())(x)


def traced(x: Any, y: Any, gamma: Any, clip: Any, weights: Any, where: Any, name: str) -> Any:
    options: dict[str, Any] = {"gamma_neg": gamma, "gamma_pos": 2.5, "clip": clip, "weights": weights, "where": where}
    return jax.value_and_grad(lambda x: asymmetric_loss(x, y, axis=(), implementation=name, **options).sum())(x)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(
    ("target", "shape", "form", "mode"),
    pairwise(("v5e", "h100"), ((7, 130), (33, 527), (64, 1024)), FORMS, ("plain", "traced", "vmap of traced")),
)
def test_every_call_compiles_with_64_bit_types(target, shape, form, mode):
    available(target)
    if form == "int64" and target in targets.TPU:
        pytest.skip("a TPU kernel loads no 64-bit labels")
    f = plain if mode == "plain" else traced
    with jax.enable_x64(True):
        shapes = S(shape, jnp.bfloat16), labels(form, shape), S((), jnp.float64), S((), jnp.float32)
        shapes = (*shapes, S((shape[0], 1), jnp.float64), S(shape, jnp.bool_))

        def run(*arrays: Any) -> Any:
            return f(*arrays, name=kernel_of(target))

        if mode.startswith("vmap"):
            shapes = jax.tree.map(lambda a: S((3, *a.shape), a.dtype), shapes)
            run = jax.vmap(run)
        assert holds_kernel(target, targets.compile_for(target, run, *shapes))


@pytest.mark.long
@pytest.mark.parametrize("form", ["int8", "packed", "sparse"])
@pytest.mark.parametrize("target", ["v6e", "tpu7x"])
def test_so_they_do_for_other_tpus(target, form):
    available(target)
    shape = (33, 527)
    with jax.enable_x64(True):
        shapes = S(shape, jnp.float32), labels(form, shape), S((), jnp.float64), S((), jnp.float64)
        shapes = (*shapes, S((527,), jnp.float64), S((33, 1), jnp.bool_))
        compiled = targets.compile_for(target, lambda *a: traced(*a, name="mosaic_tpu"), *shapes)
    assert holds_kernel(target, compiled)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("form", ["int8", "packed", "sparse"])
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_the_head_compiles_with_64_bit_types(target, form):
    available(target)

    def step(features: Any, kernel: Any, bias: Any, y: Any, gamma: Any) -> Any:
        def loss(*parameters: Any) -> Any:
            return linear_asymmetric_loss(
                *parameters[:2], y, bias=parameters[2], gamma_neg=gamma, axis=None, implementation=kernel_of(target)
            )

        return jax.value_and_grad(loss, (0, 1, 2))(features, kernel, bias)

    with jax.enable_x64(True):
        shapes = S((40, 24), jnp.bfloat16), S((24, 5000), jnp.float32), S((5000,), jnp.float32)
        compiled = targets.compile_for(target, step, *shapes, labels(form, (40, 5000)), S((), jnp.float64))
    assert holds_kernel(target, compiled)


HUGE = (3000, 2**20)  # 3,145,728,000 elements


def offsets(form: str, shape: tuple[int, ...]) -> dict[str, int] | None:
    """Bits of the largest offsets into arrays of each element type, or None where no Triton kernel was lowered."""
    from jax._src.interpreters import mlir
    from jax._src.lib import triton
    from jaxlib.mlir import ir

    f = jax.value_and_grad(lambda x, y: asymmetric_loss(x, y).sum())
    with targets.lowering_for("h100"):
        traced = jax.jit(f).trace(S(shape, jnp.bfloat16), labels(form, shape))
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    calls: list[Any] = []

    def look_at(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            calls.append(ir.StringAttr(operation.attributes["mhlo.backend_config"]["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(look_at)
    if not calls:
        return None
    (code,) = calls
    with mlir.make_ir_context() as context:
        triton.dialect.register_dialect(context)
        text = str(ir.Module.parse(code))
    found: dict[str, int] = {}
    for element, bits in re.findall(r"tt\.addptr .*: tensor<\S*!tt\.ptr<(\w+)>>, tensor<\S*i(\d+)>", text):
        found[element] = max(found.get(element, 0), int(bits))
    return found


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("int16", {"bf16": 64, "i16": 64}),
        ("packed", {"bf16": 64, "i32": 32}),
        ("sparse", {"bf16": 64, "i32": 32}),
        ("int8", None),  # JAX would count in 32 bits
        ("bool", None),
    ],
)
def test_offsets_of_a_triton_kernel_reach_the_last_element(form, expected):
    available("h100")
    found = offsets(form, HUGE)
    assert (found is None) == (expected is None)
    assert expected is None or (found is not None and found.items() >= expected.items())


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("name", ["labels", "where"])
@pytest.mark.parametrize(("rows", "served"), [(2047, True), (2048, False), (4096, False), (4097, True)])
def test_a_triton_kernel_is_refused_where_offsets_of_bytes_have_32_bits(name, rows, served):
    shape = (rows, 2**20)
    operands = Operands(S(shape, jnp.bfloat16), S(shape, jnp.int16))._replace(**{name: S(shape, jnp.bool_)})
    reason = kernels.refusal("triton", operands)
    assert (reason is None) == served
    assert served or f"its offsets of one-byte elements have 32 bits, and {name} has {rows * 2**20} elements" in str(
        reason
    )


def test_a_mosaic_gpu_kernel_is_refused_where_elements_are_more_than_32_bits_count():
    operands = Operands(S((2048, 2**20), jnp.bfloat16), S((2048, 2**20), jnp.int8))
    assert kernels.refusal("mosaic_gpu", operands) is not None


@pytest.mark.long
def test_a_tpu_kernel_of_more_than_32_bits_of_elements_compiles():
    available("v6e")
    compiled = targets.compile_for("v6e", asymmetric_loss, S(HUGE, jnp.bfloat16), S(HUGE, jnp.int8))
    assert holds_kernel("v6e", compiled)
    assert targets.temporary_bytes(compiled) <= 4 * 2**20
