"""Draws of data for a configuration of `random_configurations`, all draws of it in one stack.

Every array has the draws as its first dimension. The draws of one configuration are of several kinds: ordinary logits,
extreme ones, infinite ones, NaN. What a call leaves out is filled with what would show if it didn't.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from random_configurations import FORMS, Configuration, Shape

from asl_pallas import PackedLabels, PartialLabels, SparseLabels

Array = np.ndarray[Any, Any]
KINDS = ("ordinary", "ordinary", "wide", "near zero", "ordinary", "extreme", "infinite", "nan")
ORDINARY = ("ordinary", "wide", "near zero")
EXTREME = (0.0, -0.0, 30.0, -30.0, 88.8, -88.8, 104.0, -104.0, 1e4, -1e4, 1e-40, -1e-30, 1e30, -1e30)


@dataclasses.dataclass
class Data:
    """A stack of draws.

    Attributes:
      kinds: of each draw, one of `KINDS`.
      inputs: logits; or features, kernel and bias: what is differentiated.
      dense: labels as float64, what a call of this form means by them; `given` are dense labels as they are passed, or
        the ids of sparse ones. Of partial labels the ids of the positives stand before the negatives', and packed ones
        are 1 for a positive, 2 for a negative and 3 for both.
      arrays: where, weights and pos_weight.
      vectors: the hyper-parameters that are arrays.
      scalars: the traced hyper-parameters, and `hyperparameters` all of each draw as Python floats, without a meaning
        for those that are arrays.
      cotangent: of the loss.
    """

    kinds: list[str]
    inputs: dict[str, Array]
    dense: Array
    given: Array
    arrays: dict[str, Array]
    vectors: dict[str, Array]
    scalars: dict[str, Array]
    hyperparameters: list[tuple[float, ...]]
    cotangent: Array

    def take(self, config: Configuration, which: Any) -> tuple[Any, Any, dict[str, Any], Any]:
        """What the call gets: of one draw, or with a slice of a group of draws that jax.vmap maps over."""

        def part(name: str, stack: Array) -> Any:
            alone = not isinstance(which, slice) or name in config.shared
            array = stack[which.start if isinstance(which, slice) and alone else which]
            return array if config.host else jnp.asarray(array)

        inputs = {name: part(name, stack) for name, stack in self.inputs.items()}
        given, classes = part("labels", self.given), config.shape[-1]
        if config.labels == "packed":
            given = PackedLabels.from_dense(given)
        elif config.labels == "sparse":
            given = SparseLabels(given, classes)
        elif config.labels == "partial packed":
            given = PartialLabels(*(PackedLabels.from_dense((given & bit) > 0) for bit in (1, 2)))
        elif config.labels == "partial sparse":
            ids = given[..., : config.ids], given[..., config.ids :]
            given = PartialLabels(*(SparseLabels(some, classes) for some in ids))
        dynamic = {name: part(name, stack) for name, stack in (self.arrays | self.vectors | self.scalars).items()}
        dynamic |= {name: jnp.asarray(dynamic[name]) for name in self.scalars}
        return inputs, given, dynamic, self.cotangent[which]


def draw(config: Configuration, seed: int, number: int) -> Data:
    random = np.random.default_rng([seed, number, 1])
    n, shape = config.draws, config.shape
    kinds = [KINDS[i // max(1, config.mapped) % len(KINDS)] for i in range(n)]
    if config.mode == "others":
        kinds = ["ordinary"] * n
    dense, given = _labels(random, config)
    alone = not config.is_head and config.mode != "others" and not config.mapped
    arrays = {name: _array(random, name, (n, *s), dtype, kinds, alone) for name, (s, dtype) in config.arrays.items()}
    vectors = {name: _vector(random, config, name) for name in config.by_class}
    hyperparameters, scalars = _hyperparameters(config)
    outer = tuple(size for axis, size in enumerate(shape) if axis not in config.axes)
    cotangent = random.normal(0, 1, (n, *outer))
    cotangent.reshape(-1)[::5] = 0
    if config.is_head:
        inputs = _head(random, config, kinds)
    else:
        inputs = {"logits": _logits(random, (n, *shape), config.dtypes[0], kinds)}
    data = Data(kinds, inputs, dense, given, arrays, vectors, scalars, hyperparameters, cotangent)
    _share(config, data)
    if not config.is_head:
        _poison(random, config, data)
    return data


def _logits(random: np.random.Generator, shape: Shape, dtype: str, kinds: list[str]) -> Array:
    x = random.normal(0, 4, shape)
    for i, kind in enumerate(kinds):
        some = random.random(shape[1:])
        if kind == "wide":
            x[i] *= 8
        elif kind == "near zero":
            x[i] *= 2.0 ** -random.integers(1, 20)
        elif kind == "extreme":
            x[i] = np.where(some < 0.3, random.choice(EXTREME, shape[1:]), x[i])
        elif kind == "infinite":
            x[i] = np.where(some < 0.2, random.choice([np.inf, -np.inf], shape[1:]), x[i])
        elif kind == "nan":
            x[i] = np.where(some < 0.1, np.nan, x[i])
    return _cast(x, dtype)


def _cast(x: Array, dtype: str) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x).astype(jnp.dtype(dtype))


def _head(random: np.random.Generator, config: Configuration, kinds: list[str]) -> dict[str, Array]:
    n, classes, depth = config.draws, config.shape[-1], config.depth
    features = random.normal(0, 2, (n, *config.shape[:-1], depth))
    kernel = random.normal(0, 2 / depth**0.5, (n, depth, classes))
    bias = random.normal(0, 1, (n, classes))
    if config.function == "linear_top_k":  # exact products, and equal scores in plenty
        features, kernel, bias = (np.clip(np.round(array), -3, 3) for array in (features, kernel, bias))
    for i, kind in enumerate(kinds):
        if kind == "wide":
            features[i] *= 8 if config.function != "linear_top_k" else 1
        elif kind == "near zero":
            features[i] *= 2.0 ** -random.integers(1, 10) if config.function != "linear_top_k" else 0
        elif kind == "infinite":
            bias[i] = np.where(random.random(classes) < 0.2, random.choice([np.inf, -np.inf], classes), bias[i])
        elif kind == "nan" and config.function != "linear_top_k":
            features[i] = np.where(random.random(features[i].shape) < 0.05, np.nan, features[i])
    found = {"features": _cast(features, config.dtypes[0]), "kernel": _cast(kernel, config.dtypes[1])}
    return found | ({"bias": _cast(bias, config.dtypes[2])} if config.dtypes[2] else {})


def _labels(random: np.random.Generator, config: Configuration) -> tuple[Array, Array]:
    n, shape = config.draws, config.shape
    full = (n, *shape)
    third = -1.0 if config.third is None else float(config.third)
    if "sparse" in config.labels:
        positive, ids = _sparse(random, full, config.ids)
        dtype = np.dtype(random.choice(["int32", "int16", "int64"]))
        if config.labels == "sparse":
            return positive, ids.astype(dtype)
        negative, others = _sparse(random, full, config.ids + 2)
        dense = np.where(positive > 0, 1.0, np.where(negative > 0, 0.0, third))
        return dense, np.concatenate([ids, others], -1).astype(dtype)
    if config.labels == "partial packed":
        bits = random.choice(4, full, p=[0.5, 0.15, 0.3, 0.05]).astype(np.int8)
        return np.where(bits & 1, 1.0, np.where(bits & 2, 0.0, third)), bits
    share = random.choice([0.0, 0.02, 0.3, 0.5, 1.0], (n, *(1 for _ in shape)), p=[0.1, 0.2, 0.3, 0.3, 0.1])
    hard = (random.random(full) < share).astype(np.float64)
    if config.labels == "packed":
        return hard, hard.astype(random.choice(["bool", "int8"]))
    if config.soft:
        soft = np.where(random.random(full) < 0.5, random.random(full), hard)
        given = _cast(soft, config.labels)
        return given.astype(np.float64), given
    ignored = config.options.get("ignore_label")
    dtype = np.dtype(config.labels)
    if config.beyond:
        low = 0 if dtype.kind == "u" else -3
        numbers = random.integers(low, 6, full).astype(np.float64)
        meant = (numbers > 0).astype(np.float64)
        for number in (config.third, ignored):
            meant = np.where(numbers == number, numbers, meant) if number is not None else meant
        return meant, numbers.astype(dtype)
    if config.third is not None and dtype.kind in "iu":
        hard = np.where(random.random(full) < 0.4, third, hard)
    fits = ignored is not None and dtype.kind in "iu" and np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max
    if fits:
        hard = np.where(random.random(full) < 0.25, float(ignored), hard)
    return hard, hard.astype(dtype)


def _sparse(random: np.random.Generator, full: Shape, count: int) -> tuple[Array, Array]:
    """Labels and their ids, `count` or fewer a row."""
    *rows, classes = full
    ids = random.integers(-1, classes, (*rows, count)) if classes else np.full((*rows, count), -1)
    if count == classes:
        ids[..., :1] = -1  # or they may be refused, for what looks like dense labels
    dense = np.zeros((int(np.prod(rows)), classes))
    flat = ids.reshape(len(dense), count)
    at = np.nonzero(flat >= 0)
    dense[at[0], flat[at]] = 1
    return dense.reshape(full), ids


def _vector(random: np.random.Generator, config: Configuration, name: str) -> Array:
    """Few values: `random_family` takes one clip after the other."""
    shape, dtype = config.by_class[name]
    few = random.choice(np.array(config.kind.choices[name], np.float64), 4)
    return _cast(random.choice(few, (config.draws, *shape)), dtype)


def _array(random: np.random.Generator, name: str, shape: Shape, dtype: str, kinds: list[str], alone: bool) -> Array:
    if name == "where":
        return random.random(shape) < random.choice([0.0, 0.3, 0.8, 1.0], (len(kinds), *(1 for _ in shape[1:])))
    values = random.uniform(0, 3, shape)
    if "int" in dtype:
        values = np.floor(values)
    by_draw = random.choice(
        [1.0, 1.0, 1.0, -1.0] if name == "weights" else [1.0], (len(kinds), *(1 for _ in shape[1:]))
    )
    values = np.where(random.random(shape) < 0.3, by_draw, 1.0) * values
    values = np.where(random.random(shape) < 0.1, 0.0, values)
    if name == "pos_weight" and alone and "float" in dtype:
        ordinary = np.reshape([kind == "ordinary" for kind in kinds], (-1, *(1 for _ in shape[1:])))
        values = np.where(ordinary & (random.random(shape) < 0.03), np.inf, values)
    # 0 times an infinite loss has no value.
    infinite = np.reshape([kind in ("infinite", "extreme") for kind in kinds], (-1, *(1 for _ in shape[1:])))
    return _cast(np.where(infinite & (values <= 0), 1.0, values), dtype)


def _hyperparameters(config: Configuration) -> tuple[list[tuple[float, ...]], dict[str, Array]]:
    groups = max(1, config.mapped)
    chosen = [list(config.hyperparameters[i % len(config.hyperparameters)]) for i in range(config.draws)]
    scalars = {}
    for at, name in enumerate(config.names):
        if name in config.traced:
            stack = _cast(np.array([float(three[at]) for three in chosen]), config.traced[name])
            if name in config.shared and config.mapped:
                stack = np.repeat(stack[::groups], groups)[: config.draws]
            scalars[name] = stack
            for numbers, number in zip(chosen, stack, strict=True):
                numbers[at] = number
        else:
            for numbers in chosen:
                numbers[at] = config.hyperparameters[0][at]
    return [tuple(map(float, numbers)) for numbers in chosen], scalars


def _share(config: Configuration, data: Data) -> None:
    """What a vmap doesn't map over is the first draw's of each group."""
    if not config.mapped:
        return
    first = np.arange(config.draws) // config.mapped * config.mapped
    for name in config.shared:
        if name == "labels":
            data.dense, data.given = data.dense[first], data.given[first]
        for stacks in (data.arrays, data.vectors, data.inputs):
            if name in stacks:
                stacks[name] = stacks[name][first]


def expand(stack: Array, rank: int) -> Array:
    """(draws, ...) of an argument, with the rank of a stack of logits."""
    return stack.reshape(stack.shape[0], *(1,) * (rank - stack.ndim), *stack.shape[1:])


def _poison(random: np.random.Generator, config: Configuration, data: Data) -> None:
    """NaN logits where a call leaves an element out, and labels there that would be refused elsewhere."""
    x = data.inputs["logits"]
    out = np.zeros(x.shape, bool)
    if "where" in data.arrays:
        out |= ~expand(data.arrays["where"], x.ndim)
        checked = config.mode != "others" and not ({"where", "labels"} & set(config.shared) and config.mapped)
        if checked and config.labels not in (*FORMS, "bool"):
            junk = np.asarray(np.nan if config.soft else 7).astype(data.given.dtype)
            wrong = out & (random.random(x.shape) < 0.3)
            data.given, data.dense = np.where(wrong, junk, data.given), np.where(wrong, 0.0, data.dense)
            ignored = config.options.get("ignore_label")
            if ignored is not None:
                data.dense = np.where(wrong & (data.given == ignored), float(ignored), data.dense)
    if (ignored := config.options.get("ignore_label")) is not None:
        out |= data.dense == ignored
    if config.mapped and "logits" in config.shared:
        return
    data.inputs["logits"] = np.where(out & (random.random(x.shape) < 0.5), np.array(np.nan, x.dtype), x)
