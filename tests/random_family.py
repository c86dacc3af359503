"""What random calls with a loss object are compared with: the sides of `reference.family`, put together."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import optimising
from random_configurations import Configuration
from random_data import Array, Data, expand
from random_losses import logit_of
from random_truth import PIECE, SINGLE, Truth

ROUNDINGS = 4  # between a logit, or a probability, and its comparison with where the loss jumps
STEEP = 1e-2  # of probability beside a margin, where a power of what is left may have any slope
Pair = tuple[Array, Array]


class FamilyTruth(Truth):
    """Losses and gradients of a stack, in float64 and by the careful float32 version."""

    @functools.cached_property
    def settings(self) -> dict[str, Array]:
        """Each hyper-parameter as a call has it, with the stack's rank."""
        found = {}
        for at, name in enumerate(self.config.names):
            if name in self.data.vectors:
                stack = self.data.vectors[name].astype(np.float64 if self.double else np.float32)
                found[name] = expand(stack.astype(np.float64), self.rank)
            else:
                numbers = [numbers[at] for numbers in self.data.hyperparameters]
                found[name] = np.reshape(numbers, (-1, *(1,) * (self.rank - 1)))
        return found

    @functools.cached_property
    def careful(self) -> Pair:
        """The same by the careful float32 version; where it may be on the other side of a jump, rounded float64."""
        pairs = zip(self.elements, self._mixed(self.logits32, jnp), strict=True)
        value, slope = (np.where(self._beside[1], exact.astype(np.float32), near) for exact, near in pairs)
        return value, slope

    def _in_float64(self, x: Array, label: float | None = None, value: bool = True) -> Pair:
        if label is not None:
            return self._side(x, int(label), np)
        return self._mixed(x, np)

    def _mixed(self, x: Array, xp: ModuleType) -> Pair:
        """Value and slope of each element, with its weights."""
        dtype = np.float64 if xp is np else np.float32
        x = np.where(self.kept, x, 0).astype(dtype)
        y = np.where(self.kept, self.data.dense, 0).astype(dtype)
        s = dtype(self.config.options.get("label_smoothing", 0.0))
        soft = self.config.soft or s != 0
        y = y * (1 - s) + s / 2 if soft else y
        of_positive = self.arguments.get("pos_weight", np.ones(())).astype(dtype)
        of_negative = np.where(self._relabelled(x), of_positive, dtype(1))
        weights = self.arguments.get("weights", np.ones(())).astype(dtype)
        mixed = []
        for positive, negative in zip(self._side(x, 1, xp), self._negative(x, y, xp), strict=True):
            if soft:
                nan = np.isnan(positive) | np.isnan(negative)
                part = np.where(y > 0, y * of_positive * positive, dtype(0))
                part = part + np.where(y < 1, (1 - y) * of_negative * negative, dtype(0))
                part = np.where(nan, dtype(np.nan), part)
            else:
                part = np.where(y == 1, of_positive * positive, of_negative * negative)
            mixed.append(np.where(self.kept, part * weights, dtype(0)))
        return mixed[0], mixed[1]

    def _negative(self, x: Array, y: Array, xp: ModuleType) -> Pair:
        """Of what isn't positive."""
        negative = self._side(x, 0, xp)
        if self.config.third is None or self.config.soft:
            return negative
        pairs = zip(self._side(x, -1, xp), negative, strict=True)
        value, slope = (np.where(y == self.config.third, third, other) for third, other in pairs)
        return value, slope

    def _relabelled(self, x: Array) -> Any:
        """Which negatives are taken for positives."""
        if self.config.loss != "self-paced":
            return False
        with np.errstate(divide="ignore"):
            return x > logit_of(self.settings["threshold"])

    def _side(self, x: Array, state: int, xp: ModuleType) -> Pair:
        """Value and slope of each element as if all were of that state: 1, 0, or -1 for not annotated."""
        dtype = np.float64 if xp is np else np.float32
        if not x.size:
            return x.astype(dtype), x.astype(dtype)
        given = {name: _flat(array.astype(dtype), x.shape) for name, array in self.settings.items()}
        clips = given.pop("clip", np.zeros(1, dtype))
        found = np.zeros(x.size, dtype), np.zeros(x.size, dtype)
        for clip in np.unique(clips):
            which: Any = clips == clip if clips.size > 1 else slice(None)
            some = {name: array[which] if array.size > 1 else array[0] for name, array in given.items()}
            if "clip" in self.settings:
                some["clip"] = clip
            parts = self._alike(x.reshape(-1)[which].astype(dtype), state, xp, some)
            for whole, part in zip(found, parts, strict=True):
                whole[which] = part
        value, slope = (part.reshape(x.shape) for part in found)
        return value, np.where(np.isnan(x) & np.isnan(value), value, slope)

    def _alike(self, x: Array, state: int, xp: ModuleType, settings: dict[str, Any]) -> Pair:
        """Of elements in one dimension with one clip."""
        options: dict[str, Any] = {}
        if "stop_focus_gradient" in self.config.settings:
            options["stop_focus_gradient"] = self.config.settings["stop_focus_gradient"]
        states: Any = state if self.config.kind.has_third_state else state == 1

        def side(x: Any, arrays: dict[str, Any]) -> Pair:
            value, slope = self.config.kind.side(x, states, xp, **arrays, **options)
            return np.asarray(value), np.asarray(slope)

        if xp is np:
            return side(x, settings)
        found = [np.zeros((2, 0), np.float32)]
        with optimising(True):
            for start in range(0, x.size, PIECE):
                # JAX compiles each operation for each length: of few lengths.
                n = min(PIECE, x.size - start)
                fill = 4 ** max(5, math.ceil(math.log(n, 4))) - n
                arrays = {name: _piece(array, start, fill) for name, array in settings.items()}
                found.append(np.stack(side(_piece(x, start, fill), arrays))[:, :n])
        value, slope = np.concatenate(found, axis=1)
        return value, slope

    @functools.cached_property
    def _beside(self) -> Pair:
        """By how much logits may err where the loss or its slope jumps or is steep, else 0; and where the jumps are."""
        step, at_jump = np.zeros(self.logits.shape), np.zeros(self.logits.shape, bool)
        x, eps = self.logits, np.finfo(np.float64).eps if self.double else SINGLE
        doubt = self.doubt if self.config.is_head else 0.0
        for name in self.config.kind.jumps:
            p = self.settings[name]
            inside = (p > 0) & (p < 1)
            p = np.where(inside, p, 0.5)
            at = logit_of(p)
            # Of the logit, and of the probability: relative to it, an error moves the logit by 1 / (1 - p) of that.
            own = ROUNDINGS * eps * (abs(at) + 1 / (1 - p))
            beside = inside & (abs(x - at) <= own + doubt)
            at_jump = at_jump | beside
            if name == "clip":
                beside = beside | (inside & (abs(1 / (1 + np.exp(-x)) - p) < STEEP))
            step = np.where(beside, np.maximum(step, own + doubt), step)
        return step, at_jump

    @functools.cached_property
    def _around(self) -> Pair:
        """How far value and slope differ on both sides of where an element's logit may be."""
        step = self._beside[0]
        if not self.config.options.get("label_smoothing"):
            step = np.where(self.data.dense == 1, 0.0, step)  # no positive jumps
        if self.config.is_head:
            step = np.maximum(step, self.doubt)
        if not step.any():
            return np.zeros(step.shape), np.zeros(step.shape)
        below, above = (self._mixed(self.logits + sign * step, np) for sign in (-1, 1))
        value, slope = (np.nan_to_num(abs(high - low), posinf=0.0) for low, high in zip(below, above, strict=True))
        return value, slope

    @property
    def doubts(self) -> Array:
        return self._around[1]

    @property
    def doubts_of_values(self) -> Array:
        return np.where(self._beside[0] > 0, self._around[0], 0.0)

    @property
    def doubts_of_sides(self) -> Array:
        """At a jump, what the side that jumps may be."""
        step, at_jump = self._beside
        if not at_jump.any():
            return np.zeros(step.shape)
        y = np.where(self.kept, self.data.dense, 0.0)
        both = (abs(self._negative(self.logits + sign * step, y, np)[0]) for sign in (-1, 1))
        return np.where(at_jump, np.nan_to_num(sum(both)), 0.0)

    def wrong_values(self, found: Array) -> tuple[Array, str]:
        return super().wrong_values(
            np.where(self._without_value(0).any(self.axes), self.elements[0].sum(self.axes), found).astype(found.dtype)
        )

    def wrong_gradient(self, found: Array) -> tuple[Array, str]:
        truth = self._outer(self.elements[1])
        return super().wrong_gradient(np.where(self._without_value(1), truth, found).astype(found.dtype))

    def _without_value(self, which: int) -> Array:
        """Where infinity is multiplied by 0, or by what may be of either sign, so that any result will do.

        That is an infinite loss by an alpha, and an infinite pos_weight by an alpha or by a difference that cancels.
        """
        x, number = self.logits, self.elements[which]
        cancels = np.isinf(number) & np.isfinite(x) if self.config.loss == "polynomial" else False
        return (np.isnan(number) & ~np.isnan(x)) | cancels

    def sides(self) -> tuple[Array, Array, Array, Array | bool]:
        x, y = (np.where(self.kept, array, 0.0) for array in (self.logits, self.data.dense))
        positive, negative = self._side(x, 1, np)[0], self._negative(x, y, np)[0]
        return y if self.config.soft else np.where(y == 1, 1.0, 0.0), positive, negative, self._relabelled(x)


def truth_of(config: Configuration, data: Data) -> Truth:
    return (FamilyTruth if config.takes_object else Truth)(config, data)


def _flat(array: Array, shape: tuple[int, ...]) -> Array:
    """In one dimension; one element where all are the same."""
    if (array == array.reshape(-1)[:1].reshape((1,) * array.ndim)).all():
        return array.reshape(-1)[:1]
    return np.broadcast_to(array, shape).reshape(-1)


def _piece(array: Any, start: int, fill: int) -> Any:
    return jnp.asarray(np.pad(array[start : start + PIECE], (0, fill)) if np.ndim(array) else array)
