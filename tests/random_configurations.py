"""Configurations of random calls: what a call knows before it is traced, drawn from a seed.

A configuration is compiled once and called with many draws of data (`random_data`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from random_losses import KINDS, Kind

Shape = tuple[int, ...]
Random = np.random.Generator

ELEMENTS, INTERPRETED_ELEMENTS, STREAMED_ELEMENTS = 16_000, 1_500, 150_000
DRAWS, EAGER_DRAWS, INTERPRETED_DRAWS, LARGE_DRAWS = 64, 32, 8, 6
LEADING = (1, 1, 2, 3, 5, 7)
CLASSES = (1, 2, 3, 5, 7, 13, 31, 80, 127, 128, 129, 257, 1023)
WIDE = (4095, 4096, 4097, 8193)
LABELS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "bfloat16", "float16")
FORMS = ("packed", "sparse", "partial packed", "partial sparse")
# Of losses with three states, each with what may mark the third.
SIGNED, UNSIGNED = (-1, -1, -1, -100, 2, 7, 100), (2, 7, 255)
THREE_STATES = {
    **dict.fromkeys(("int8", "int16", "int32", "int64", "bool", "float32", "bfloat16", "packed", "sparse"), SIGNED),
    **dict.fromkeys(("uint8", "uint16", "uint32"), UNSIGNED),
}
PARTIAL = FORMS[2:]
FUNCTIONS = (
    *("asymmetric_loss",) * 13,
    *("linear_asymmetric_loss",) * 6,
    "linear_top_k",
    *("multilabel_loss",) * 5,
    *("linear_multilabel_loss",) * 2,
)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is static of a call.

    Attributes:
      shape: of the logits; for `linear_top_k`, of the scores of all classes.
      depth: of the features of a head.
      dtypes: of the logits; of features, kernel and bias for a head, whose bias may be "".
      labels: a dtype for dense labels, or one of `FORMS`, the sparse ones with `ids` positive ids per row.
      host: labels, logits and masks are NumPy arrays, else JAX arrays.
      beyond: integer labels that only a traced call can get: any integer above 0 is a positive.
      arrays: shape and dtype of where, weights and pos_weight, where the call has them.
      loss: one of `KINDS`; the asymmetric functions' is "asymmetric".
      settings: of the loss object, beside the hyper-parameters.
      traced: the dtypes of the hyper-parameters that are traced scalars.
      by_class: shape and dtype of those that are arrays.
      hyperparameters: in the order of `names`, those of all draws, or several where some are traced. What is an array
        is drawn with the data.
      mode: "value", "grad" (of a sum), "vjp", or "others": the gradient by weights, pos_weight and soft labels.
      mapped: examples of a jax.vmap around the call, 0 for none; `shared` names the arguments that it doesn't map.
      strict: JAX's strict dtype promotion, and no rank promotion.
    """

    function: str
    shape: Shape
    depth: int
    dtypes: tuple[str, ...]
    labels: str
    ids: int
    host: bool
    beyond: bool
    arrays: dict[str, tuple[Shape, str]]
    loss: str
    settings: dict[str, Any]
    traced: dict[str, str]
    by_class: dict[str, tuple[Shape, str]]
    hyperparameters: tuple[tuple[Any, ...], ...]
    options: dict[str, Any]
    mode: str
    jit: bool
    x64: bool
    mapped: int
    shared: tuple[str, ...]
    strict: bool
    draws: int

    @property
    def is_head(self) -> bool:
        return self.function.startswith("linear")

    @property
    def takes_object(self) -> bool:
        return self.function.endswith("multilabel_loss")

    @property
    def kind(self) -> Kind:
        return KINDS[self.loss]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters."""
        return tuple(self.kind.choices)

    @property
    def third(self) -> int | None:
        """The label of what is not annotated."""
        return self.settings.get("unannotated_label")

    @property
    def soft(self) -> bool:
        return self.labels not in FORMS and jnp.issubdtype(jnp.dtype(self.labels), jnp.floating)

    @property
    def implementation(self) -> str | None:
        return self.options.get("implementation")

    @property
    def axes(self) -> tuple[int, ...]:
        """What the loss is summed over, counted from the front."""
        axis = self.options.get("axis", -1)
        ndim = len(self.shape)
        if axis is None:
            return tuple(range(ndim))
        return tuple(sorted(int(a) % ndim for a in (axis if isinstance(axis, (tuple, list)) else (axis,))))

    def __str__(self) -> str:
        parts = [f"{self.function} {self.shape} {'/'.join(self.dtypes)} labels={self.labels}"]
        parts += [f"ids={self.ids}"] if "sparse" in self.labels else []
        parts += [f"d={self.depth}"] if self.is_head else []
        parts += [f"{name}:{dtype}{list(shape)}" for name, (shape, dtype) in self.arrays.items()]
        parts += [f"{name}={value!r}" for name, value in self.options.items()]
        parts += [f"loss={self.loss} {self.settings}"] if self.takes_object else []
        parts += [f"({', '.join(self.names)})={self.hyperparameters[0]!r}"]
        parts += [f"traced={self.traced}"] if self.traced else []
        parts += [f"{name}:{dtype}{list(shape)}" for name, (shape, dtype) in self.by_class.items()]
        flags = ("jit", "x64", "strict", "host", "beyond")
        parts += [f"mode={self.mode}", *(flag for flag in flags if getattr(self, flag))]
        parts += [f"vmap={self.mapped} shared={self.shared}"] if self.mapped else []
        return " ".join(parts)


def draw(seed: int, number: int) -> Configuration:
    """The configuration of that number: the same for the same seed, whatever ran before."""
    random = np.random.default_rng([seed, number])
    function = _one(random, FUNCTIONS)
    head, takes_object = function.startswith("linear"), function.endswith("multilabel_loss")
    loss = _one(random, tuple(KINDS)) if takes_object else "asymmetric"
    kind = KINDS[loss]
    implementation = _one(random, [None] * 68 + ["xla"] * 28 + (["mosaic_tpu", "triton"] * 2 if not head else []))
    interpreted = implementation not in (None, "xla")
    large = not head and not interpreted and random.random() < 0.02
    shape = _shape(random, INTERPRETED_ELEMENTS if interpreted else ELEMENTS, large)
    x64 = bool(random.random() < 0.15)
    logits = _one(random, ["float32"] * 4 + ["bfloat16"] * 2 + ["float16"] + ["float64"] * (4 if x64 else 0))
    dtypes = (logits,)
    if head:
        same = random.random() < 0.6
        kernel = logits if same else _one(random, ["float32", "bfloat16", "float16"] + ["float64"] * x64)
        dtypes = (logits, kernel, _one(random, ["", "float32", logits, kernel]))
    labels = _one(random, [*LABELS, "packed", "packed", "sparse", "sparse"] + ["float64"] * x64)
    if kind.has_third_state:
        labels = _one(random, [*THREE_STATES, "int8", "int32", *PARTIAL * 3])
    dense = labels not in FORMS
    soft = dense and jnp.issubdtype(jnp.dtype(labels), jnp.floating)
    jit = bool(random.random() < 0.8)
    options = _options(random, head, shape, dense and not soft, implementation, logits)
    if dense and not soft and labels != "bool" and not _holds(labels, options.get("ignore_label", 0)):
        del options["ignore_label"]  # which is refused
    settings = _settings(random, kind, labels, options) if takes_object else {}
    arrays = _arrays(random, shape, x64)
    by_class = _by_class(random, loss, shape) if takes_object else {}
    if not head:
        arrays, by_class = (
            {name: (_along_one_axis(of, shape, options["axis"]), dtype) for name, (of, dtype) in some.items()}
            for some in (arrays, by_class)
        )
    mapped = int(random.choice([2, 3])) if random.random() < 0.15 else 0
    scalars = tuple(name for name in kind.choices if name not in by_class)
    traced = _traced(random, scalars, x64) if scalars and random.random() < 0.3 else {}
    top_k = function == "linear_top_k"
    if top_k:
        shape = (*shape[:-1], max(1, shape[-1]))
        k = int(random.integers(1, shape[-1] + 1))
        options = {"k": k} | {name: options[name] for name in ("chunk_size",) if name in options}
        labels, soft, arrays, traced = "bool", False, {}, {}
    others = {name for name in ("weights", "pos_weight") if name in arrays and "int" not in arrays[name][1]}
    others |= {"labels"} if soft else set()
    modes = ["value"] if top_k else ["vjp"] * 5 + ["grad"] * 3 + ["value"] + ["others"] * bool(others)
    draws = INTERPRETED_DRAWS if interpreted else LARGE_DRAWS if large else DRAWS if jit else EAGER_DRAWS
    arguments = ("logits", "labels", *arrays, *traced, *by_class)
    beyond = jit and dense and not soft and "int" in labels and settings.get("unannotated_label", -1) < 0
    return Configuration(
        function=function,
        shape=shape,
        depth=int(_one(random, [1, 2, 3, 7, 16])) if head else 0,
        dtypes=dtypes,
        labels=labels,
        ids=int(random.integers(0, 6)),
        host=bool(random.random() < 0.5),
        beyond=bool(beyond and random.random() < 0.1),
        arrays=arrays,
        loss=loss,
        settings=settings,
        traced=traced,
        by_class=by_class,
        hyperparameters=tuple(_hyperparameters(random, kind) for _ in range(4 if traced else 1)),
        options=options,
        mode=_one(random, modes),
        jit=jit,
        x64=x64,
        mapped=mapped,
        shared=tuple(name for name in arguments if random.random() < 0.2 and not (head and name == "logits")),
        strict=bool(random.random() < 0.05),
        draws=draws,
    )


def _one(random: Random, among: Any) -> Any:
    return among[int(random.integers(len(among)))]


def _shape(random: Random, elements: int, large: bool) -> Shape:
    if large:  # beyond what the CPU's path does in one piece
        classes = int(_one(random, [130, 4099, 33_000]))
        rows = math.ceil(70_000 / classes) + int(random.integers(3))
        return (rows, classes) if random.random() < 0.5 else (2, math.ceil(rows / 2), classes)
    leading = [int(_one(random, LEADING)) for _ in range(int(random.integers(5)))]
    classes = int(_one(random, WIDE if random.random() < 0.12 else CLASSES))
    if random.random() < 0.04:
        sizes = [*leading, classes]
        sizes[int(random.integers(len(sizes)))] = 0
        return tuple(sizes) if sizes[-1] or random.random() < 0.5 else (*sizes[:-1], 3)
    while math.prod(leading) * classes > elements:
        if leading and math.prod(leading) > 1:
            leading[leading.index(max(leading))] = 1
        else:
            classes = int(_one(random, CLASSES))
    return (*leading, classes)


def _options(
    random: Random, head: bool, shape: Shape, integers: bool, implementation: str | None, dtype: str
) -> dict[str, Any]:
    options: dict[str, Any] = {"axis": _axis(random, len(shape), head)}
    if implementation is not None:
        options["implementation"] = implementation
    if integers and random.random() < 0.3:
        options["ignore_label"] = _one(random, [-1, -1, -100, 2, 255, 100, np.int64(-1)])
    if random.random() < 0.15:
        options["label_smoothing"] = _one(random, [0.1, 0.5, 0.999, 0, np.float32(0.25)])
    if random.random() < 0.2:
        options["stop_focus_gradient"] = _one(random, [True, np.bool_(True)])
    if not head and random.random() < 0.1:
        options["donate_logits"] = True
    if head and random.random() < 0.6:
        options["chunk_size"] = int(_one(random, [1, 2, 3, 7, 32, 100, 128, 256, 4096, 5000]))
        if shape[-1] / options["chunk_size"] > 300:
            options["chunk_size"] = 128
    if head and random.random() < 0.1:
        options["precision"] = "highest"
    return options


def _axis(random: Random, ndim: int, classes_too: bool) -> Any:
    kind = random.random()
    if kind < 0.35:
        return _one(random, [-1, -1, ndim - 1, np.int64(-1), (-1,), [ndim - 1]])
    if kind < 0.5:
        return None
    if kind < 0.62 and not classes_too:
        return _one(random, [(), []])
    some = [a for a in range(ndim) if random.random() < 0.5]
    if classes_too and ndim - 1 not in some:
        some.append(ndim - 1)
    some = [a - ndim if random.random() < 0.5 else a for a in some]
    random.shuffle(some)
    return some[0] if len(some) == 1 and random.random() < 0.7 else tuple(some)


def _broadcastable(random: Random, shape: Shape) -> Shape:
    kind = random.random()
    if kind < 0.25:
        return shape
    if kind < 0.4:
        return ()
    if kind < 0.55:
        return shape[-1:]
    some = tuple(1 if random.random() < 0.5 else n for n in shape)
    return some[int(random.integers(len(shape) + 1)) :] if random.random() < 0.3 else some


def _arrays(random: Random, shape: Shape, x64: bool) -> dict[str, tuple[Shape, str]]:
    floats = ["float32"] * 5 + ["bfloat16", "float16", "int32", "int8"] + ["float64"]
    arrays = {}
    if random.random() < 0.35:
        arrays["where"] = (_broadcastable(random, shape), "bool")
    if random.random() < 0.3:
        arrays["weights"] = (_broadcastable(random, shape), _one(random, floats))
    if random.random() < 0.3:
        of_classes = random.random() < 0.5
        arrays["pos_weight"] = (shape[-1:] if of_classes else _broadcastable(random, shape), _one(random, floats))
    return arrays


def _holds(dtype: str, number: int) -> bool:
    return bool(np.iinfo(dtype).min <= number <= np.iinfo(dtype).max)


def _along_one_axis(of: Shape, shape: Shape, axis: Any) -> Shape:
    """A vector that could go along two axes is refused: with the other dimensions it goes along the last."""
    axes = range(len(shape)) if axis is None else np.atleast_1d(np.asarray(axis, int)) % max(len(shape), 1)
    last = len(shape) - 1
    ambiguous = len(of) == 1 and of[0] > 1 and last not in axes and any(shape[a] == of[0] for a in axes)
    return (1, *of) if ambiguous else of


def _settings(random: Random, kind: Kind, labels: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of the loss object; `options` lose what belongs there, and what a loss with three states refuses."""
    settings = {}
    if "stop_focus_gradient" in kind.fields:
        settings["stop_focus_gradient"] = bool(random.random() < 0.5)
    options.pop("stop_focus_gradient", None)
    if kind.has_third_state:
        third = _one(random, THREE_STATES.get(labels, SIGNED))
        settings["unannotated_label"] = third
        options.pop("label_smoothing", None)
        if options.get("ignore_label") == third:
            del options["ignore_label"]
    return settings


def _by_class(random: Random, loss: str, shape: Shape) -> dict[str, tuple[Shape, str]]:
    """The asymmetric loss of numbers has functions of its own."""
    names = list(KINDS[loss].choices)
    always = loss == "asymmetric"
    chosen = [name for name in names if random.random() < (0.8 if name == "prior" else 0.5)]
    if not names or not (always or random.random() < 0.35):
        chosen = [name for name in chosen if name == "prior"]
    elif always and not chosen:
        chosen = ["gamma_neg"]
    dtypes = ["float32"] * 5 + ["bfloat16", "float16", "float64", "int32"]
    found = {}
    for name in chosen:
        of_classes = random.random() < 0.5
        found[name] = (shape[-1:] if of_classes else _broadcastable(random, shape), _one(random, dtypes))
    return found


def _traced(random: Random, names: tuple[str, ...], x64: bool) -> dict[str, str]:
    dtypes = ["float32"] * 5 + ["bfloat16", "float16"] + ["float64"] * (2 * x64)
    traced = {name: _one(random, dtypes) for name in names if random.random() < 0.6}
    return traced or {names[0]: "float32"}


def _hyperparameters(random: Random, kind: Kind) -> tuple[Any, ...]:
    if random.random() < 0.3:
        return kind.usual
    converted = [lambda x: x] * 8 + [np.float32, np.float64]
    return tuple(_one(random, converted)(_one(random, choices)) for choices in kind.choices.values())
