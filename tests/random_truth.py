"""What random calls are compared with: float64, and the bound of `cases`, for a stack of draws at once."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import careful_pair
from random_configurations import Configuration
from random_data import ORDINARY, Array, Data, expand

from reference import float64

SINGLE = float(np.finfo(np.float32).eps)
PIECE = 4**8
LARGEST_WEIGHTS = 20  # more than a weight times a pos_weight


class Truth:
    """Losses and gradients of a stack, in float64 and by the careful float32 version."""

    def __init__(self, config: Configuration, data: Data):
        self.config, self.data = config, data
        self.rank = len(config.shape) + 1
        self.axes = tuple(axis + 1 for axis in config.axes)
        self.double = config.dtypes[0] == "float64"
        self.operands: tuple[Array, Array] | None = None
        if config.is_head:
            f, w = data.inputs["features"], data.inputs["kernel"]
            w = w.astype(f.dtype)
            self.operands = f.astype(np.float64), w.astype(np.float64)
            bias = expand(data.inputs["bias"], self.rank).astype(np.float64) if "bias" in data.inputs else 0.0
            self.logits = _product(*self.operands) + bias
            bias32 = np.float32(0) if "bias" not in data.inputs else bias.astype(np.float32)
            self.logits32 = _product(f.astype(np.float32), w.astype(np.float32)) + bias32
            with np.errstate(invalid="ignore"):
                magnitude = _product(*map(abs, self.operands)) + abs(bias)
            self.doubt = (
                2
                * (np.finfo(np.float64).eps if self.double else SINGLE)
                * np.where(np.isfinite(magnitude), magnitude, 0.0)
            )
        else:
            self.logits = data.inputs["logits"].astype(np.float64)
            self.logits32 = data.inputs["logits"].astype(np.float32)

    @functools.cached_property
    def cotangent(self) -> Array:
        outer = self.data.cotangent.astype(np.float64 if self.double else np.float32).astype(np.float64)
        return np.broadcast_to(np.expand_dims(outer, self.axes) if self.axes else outer, self.logits.shape)

    @functools.cached_property
    def arguments(self) -> dict[str, Array]:
        """where, weights and pos_weight with the stack's rank, in the dtype that JAX has them in."""
        found = {}
        for name, stack in self.data.arrays.items():
            array = expand(stack, self.rank)
            if name != "where":
                array = array.astype(np.float64 if self.double else np.float32).astype(np.float64)
            found[name] = array
        return found

    @functools.cached_property
    def elements(self) -> tuple[Array, Array]:
        """Loss and slope of each element in float64."""
        return self._in_float64(self.logits)

    @functools.cached_property
    def careful(self) -> tuple[Array, Array]:
        """The same by the careful float32 version."""
        value, slope = np.zeros(self.logits.shape, np.float32), np.zeros(self.logits.shape, np.float32)
        for which, options in self._groups():
            arrays = {name: array[which] for name, array in self.arguments.items()}
            value[which], slope[which] = _careful(self.logits32[which], self.data.dense[which], arrays, options)
        return value, slope

    def _in_float64(self, x: Array, label: float | None = None, value: bool = True) -> tuple[Array, Array]:
        of_loss, of_slope = np.zeros(x.shape), np.zeros(x.shape)
        for which, options in self._groups():
            arrays = {name: array[which] for name, array in self.arguments.items()}
            y = self.data.dense[which]
            if label is not None:
                y, arrays = np.full(y.shape, label), {}
                options = options | {"ignore_label": None, "label_smoothing": 0.0}
            if value:
                of_loss[which] = float64.asymmetric_loss(x[which], y, axis=(), **arrays, **options)
            of_slope[which] = float64.gradient(x[which], y, axis=(), **arrays, **options)
        return of_loss, of_slope

    def _groups(self) -> Any:
        """Which draws have the same hyper-parameters, and the options of the reference."""
        names = ("ignore_label", "label_smoothing", "stop_focus_gradient")
        options = {name: self.config.options[name] for name in names if name in self.config.options}
        if "label_smoothing" in options:
            options["label_smoothing"] = float(options["label_smoothing"])
        for three in dict.fromkeys(self.data.hyperparameters):
            which = np.array([other == three for other in self.data.hyperparameters])
            yield which, options | dict(zip(self.config.names, three, strict=True))

    @functools.cached_property
    def doubts(self) -> Array:
        """By how much an element's slope may err because the last bits of its logit, or of clip, are uncertain.

        Large at the margin alone, where the slope jumps or has no bounded derivative; and in a head, whose logits are
        rounded.
        """
        if self.config.is_head:
            (_, below), (_, above) = (self._in_float64(self.logits + s * self.doubt, value=False) for s in (-1, 1))
            with np.errstate(invalid="ignore"):
                return np.nan_to_num(abs(above - below), posinf=0.0)
        clip = np.reshape([three[2] for three in self.data.hyperparameters], (-1, *(1,) * (self.rank - 1)))
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            near = (clip > 0) & (abs(1 / (1 + np.exp(-self.logits)) - clip) < 1e-2)
            step = np.where(near, (1e-15 if self.double else 5e-7) / (clip * (1 - clip)), 0.0)
        if not near.any():
            return np.zeros(self.logits.shape)
        (_, below), (_, above) = (self._in_float64(self.logits + s * step, value=False) for s in (-1, 1))
        return np.nan_to_num(np.where(near, abs(above - below), 0.0), posinf=0.0)

    @property
    def doubts_of_values(self) -> Array:
        """By how much an element's loss may err because it jumps near its logit."""
        return np.zeros(self.logits.shape)

    @property
    def doubts_of_sides(self) -> Array:
        """The same of either side alone, for gradients by weights and labels."""
        return np.zeros(self.logits.shape)

    def wrong_values(self, found: Array) -> tuple[Array, str]:
        elements, careful = self.elements[0], self.careful[0]
        with np.errstate(invalid="ignore"):
            truth, size = elements.sum(self.axes), abs(elements).sum(self.axes)
        # XLA adds thousands of float32 numbers one by one, and for equal ones every addition may round the same way.
        count = math.prod(self.logits.shape[axis] for axis in self.axes)
        extra: Any = (
            (0.0 if self.double else SINGLE) * math.sqrt(count) * np.maximum(1.0, np.nan_to_num(size, posinf=0.0))
        )
        if count == 1:
            extra = 0.0
        if self.config.is_head:
            extra = extra + np.nan_to_num(abs(self.elements[1]) * self.doubt, posinf=0.0).sum(self.axes)
        extra = extra + self.doubts_of_values.sum(self.axes)
        careful_sum = np.asarray(jnp.sum(careful, self.axes)) if self.axes else careful
        return self._wrong("loss", found, truth, careful_sum, size, extra, ())

    def wrong_gradient(self, found: Array) -> tuple[Array, str]:
        (_, slope), (_, careful) = self.elements, self.careful
        truth, near = self._outer(slope), self._outer(careful).astype(np.float32)
        dtype = self.config.dtypes[0]
        roundings = () if dtype in ("float32", "float64") else (dtype, dtype)
        return self._wrong("gradient", found, truth, near, abs(truth), self.doubts * abs(self.cotangent), roundings)

    def _outer(self, slope: Array) -> Array:
        """Times the cotangent, where the element counts."""
        return np.where(slope == 0, 0.0, slope * self.cotangent)

    def wrong_head_gradients(self, found: dict[str, Array]) -> tuple[Array, str]:
        assert self.operands is not None
        slope, near = self._outer(self.elements[1]), self._outer(self.careful[1]).astype(np.float32)
        doubt = self.doubts * abs(self.cotangent)
        # Of an example, or a class, of which nothing counts, what isn't finite goes into no product.
        kept = _flat(self.kept)
        f = np.where(kept.any(-1, keepdims=True), _flat(self.operands[0]), 0.0)
        w = np.where(kept.any(-2, keepdims=True), self.operands[1], 0.0)
        g, g32, u = _flat(slope), _flat(near), _flat(doubt)
        f32, w32 = f.astype(np.float32), w.astype(np.float32)
        across, down = (0, 2, 1), (0, 2, 1)
        shape = self.data.inputs["features"].shape

        def bring(product: Any) -> dict[str, Array]:
            of_features, of_kernel, of_bias = product
            return {"features": of_features.reshape(shape), "kernel": of_kernel, "bias": of_bias}

        with np.errstate(invalid="ignore"):
            truth = bring((g @ w.transpose(across), f.transpose(down) @ g, g.sum(1)))
            careful = bring((g32 @ w32.transpose(across), f32.transpose(down) @ g32, g32.sum(1)))
            size = bring((abs(g) @ abs(w).transpose(across), abs(f).transpose(down) @ abs(g), abs(g).sum(1)))
            extra = bring((u @ abs(w).transpose(across), abs(f).transpose(down) @ u, u.sum(1)))
        wrong, sentence = np.zeros(self.config.draws, bool), ""
        for name, gradient in found.items():
            own = str(gradient.dtype)
            if own != str(self.data.inputs[name].dtype):
                return np.ones(self.config.draws, bool), f"gradient of {name} has dtype {own}"
            roundings = (self.config.dtypes[0], own, own)
            args = truth[name], careful[name], size[name], np.nan_to_num(extra[name])
            bad, said = self._wrong(f"gradient of {name}", gradient, *args, roundings)
            wrong, sentence = wrong | bad, sentence or said
        return wrong, sentence

    @functools.cached_property
    def kept(self) -> Array:
        """Which elements count."""
        kept = np.broadcast_to(self.arguments.get("where", np.True_), self.logits.shape)
        if (ignored := self.config.options.get("ignore_label")) is not None:
            kept = kept & (self.data.dense != ignored)
        return kept

    def sides(self) -> tuple[Array, Array, Array, Array | bool]:
        """The share of the positive side in each element, its loss, the other's, and where pos_weight is that's too."""
        x = np.where(self.kept, self.logits, 0.0)
        positive, negative = (self._in_float64(x, side)[0] for side in (1.0, 0.0))
        return np.where(self.kept, self.data.dense, 0.0), positive, negative, False

    def wrong_other_gradients(self, found: dict[str, Array]) -> tuple[Array, str]:
        """Those by weights, pos_weight and soft labels."""
        ones = np.ones(self.logits.shape)
        weights, pos_weight = (self.arguments.get(name, ones) for name in ("weights", "pos_weight"))
        y, positive, negative, relabelled = self.sides()
        s = float(self.config.options.get("label_smoothing", 0.0))
        y = y * (1 - s) + s / 2
        outer = np.where(self.kept, self.cotangent, 0.0)
        by_state = np.where(relabelled, pos_weight, 1.0)
        terms = {
            "weights": (outer * pos_weight * y * positive, outer * by_state * (1 - y) * negative),
            "pos_weight": (outer * weights * y * positive, outer * weights * (1 - y) * negative * relabelled),
            "labels": (
                outer * weights * (1 - s) * pos_weight * positive,
                -outer * weights * (1 - s) * by_state * negative,
            ),
        }
        wrong, sentence = np.zeros(self.config.draws, bool), ""
        for name, gradient in found.items():
            like = expand(self.data.arrays[name], self.rank).shape if name != "labels" else self.logits.shape
            axes = tuple(a for a, (n, m) in enumerate(zip(like, self.logits.shape, strict=True)) if n != m)
            truth = sum(terms[name]).sum(axes, keepdims=True)
            size = sum(map(abs, terms[name])).sum(axes, keepdims=True)
            roundings = (str(gradient.dtype),) * 2
            shaped = gradient.reshape(like)
            extra = self.doubts_of_sides * abs(outer) * LARGEST_WEIGHTS
            if self.config.is_head:
                slopes = (self._in_float64(self.logits, side)[1] for side in (1.0, 0.0))
                extra = extra + np.nan_to_num(sum(map(abs, slopes)) * self.doubt * abs(outer) * LARGEST_WEIGHTS)
            extra = extra.sum(axes, keepdims=True)
            extra = extra + (0.0 if self.double else 4e-6) * size
            bad, said = self._wrong(f"gradient of {name}", shaped, truth, truth, size, extra, roundings)
            wrong, sentence = wrong | bad, sentence or said
        return wrong, sentence

    def _wrong(
        self, what: str, found: Array, truth: Array, careful: Array, size: Array, extra: Any, roundings: tuple[str, ...]
    ) -> tuple[Array, str]:
        """Which draws are beyond the bound, and a sentence about the worst element."""
        n = self.config.draws
        if found.shape != truth.shape:
            return np.ones(n, bool), f"{what} has shape {found.shape[1:]}, expected {truth.shape[1:]}"
        if not truth.size:
            return np.zeros(n, bool), ""
        size = np.maximum(1.0, np.where(np.isfinite(size), size, 1.0))
        bound = np.zeros(truth.shape)
        if self.double:
            bound += 1e-12
        else:
            error = _error(careful, truth, size)
            for kinds in (True, False):
                which = np.array([(kind in ORDINARY) == kinds for kind in self.data.kinds])
                if which.any():
                    among = error[which]
                    bound[which] = 1.5 * np.max(among, where=np.isfinite(among), initial=0.0) + 1e-6
        for dtype in roundings:
            share = np.minimum(np.where(np.isfinite(truth), abs(truth), 0.0) / size, 1.0)
            kind = jnp.finfo(dtype)
            bound = bound + float(kind.eps) / 2 * (share if len(roundings) == 2 else 1.0) * (1 + bound)
            bound = bound + float(kind.smallest_subnormal) / 2 / size  # below that a number is 0
        bound = bound + np.where(np.isfinite(extra), extra, 0.0) / size
        excess = _error(found, truth, size) - bound
        if roundings:  # beyond the largest number of the dtype it is infinite
            most = float(jnp.finfo(roundings[-1]).max)
            excess = np.where((abs(truth) > most * (1 - 1e-2)) & np.isinf(found.astype(np.float64)), -1.0, excess)
        if np.isinf(self.data.arrays.get("pos_weight", np.zeros(1)).astype(np.float64)).any():
            # Infinity times what is too small for a float32 has no value there.
            excess = np.where(np.isnan(careful) & ~np.isnan(truth), -1.0, excess)
        wrong = (excess > 0).reshape(n, -1).any(1)
        if not wrong.any():
            return wrong, ""
        at = np.unravel_index(np.argmax(excess), excess.shape)
        draw, *place = map(int, at)
        sentence = (
            f"{what} at {tuple(place)} of draw {draw} ({self.data.kinds[draw]}): {found[at]!s}, in float64 "
            f"{truth[at]!s}, careful float32 {careful[at]!s}; error {_error(found, truth, size)[at]:.3g} of "
            f"max(1, |truth|), allowed {bound[at]:.3g}; {int((excess > 0).sum())} elements of {int(wrong.sum())} draws"
        )
        if truth.shape == self.logits.shape:
            sentence += f"; logit {self.logits[at]!s}, label {self.data.dense[at]!s}"
        return wrong, sentence


def wrong_top_k(config: Configuration, data: Data, scores: Array, ids: Array) -> tuple[Array, str]:
    """Exact: the draws' logits are small integers."""
    logits = Truth(config, data).logits
    k = config.options["k"]
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(logits, expected, -1)
    bad = scores.astype(np.float64) != best
    # jax.lax.top_k takes -0.0 for less than 0.0, and which of them a product is depends on how it was summed up.
    bad |= np.where(best == 0, np.take_along_axis(logits, ids, -1) != 0, ids != expected)
    ascending = np.sort(ids, axis=-1)
    bad[..., 1:] |= ascending[..., 1:] == ascending[..., :-1]
    wrong = bad.reshape(config.draws, -1).any(1)
    return wrong, f"draws {np.flatnonzero(wrong)[:5].tolist()}" if wrong.any() else ""


def _error(found: Array, truth: Array, size: Array) -> Array:
    """In units of size; 0 where both are the same infinity or both NaN, infinite where one is."""
    f = np.asarray(found).astype(np.float64)
    finite = np.isfinite(f) & np.isfinite(truth)
    same = (f == truth) | (np.isnan(f) & np.isnan(truth))
    error = abs(np.where(finite, f, 0.0) - np.where(finite, truth, 0.0)) / size
    return np.where(finite, error, np.where(same, 0.0, np.inf))


def _careful(x: Array, y: Array, arrays: dict[str, Array], options: dict[str, Any]) -> tuple[Array, Array]:
    """`careful_pair` of each element, in pieces of few lengths: JAX compiles each of its operations for each length."""
    flat = {name: np.broadcast_to(array, x.shape).ravel() for name, array in arrays.items()}
    flat |= {"logits": x.ravel(), "labels": y.ravel()}
    found: list[tuple[Array, Array]] = []
    for start in range(0, x.size, PIECE):
        piece = {name: array[start : start + PIECE] for name, array in flat.items()}
        n = len(piece["logits"])
        length = 4 ** max(5, math.ceil(math.log(n, 4)))
        padded = {name: np.pad(array, (0, length - n)) for name, array in piece.items()}
        with np.errstate(all="ignore"):
            pair = careful_pair(padded.pop("logits"), padded.pop("labels"), 1.0, axis=(), **padded, **options)
        found.append((pair[0][:n], pair[1][:n]))
    if not found:
        return np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    value, slope = (np.concatenate(parts).reshape(x.shape) for parts in zip(*found, strict=True))
    return value, slope


def _product(f: Array, w: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return (_flat(f) @ w).reshape(*f.shape[:-1], w.shape[-1])


def _flat(array: Array) -> Array:
    """(draws, rows, last)."""
    rows = math.prod(array.shape[1:-1])
    return array.reshape(array.shape[0], rows, array.shape[-1])
