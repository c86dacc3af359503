"""What other libraries call an argument, and what to write here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# What other libraries call it -> what to write here.
_ELSEWHERE = {
    "weight": "weights=... weighs elements, pos_weight=... the positive terms",
    "reduction": "axis=None sums over all elements, axis=() over none; a mean is asymmetric_loss(...).mean()",
    "smoothing": "label_smoothing=...",
    "eps": "leave it out, since nothing is clamped: the loss is exact for any logit",
    "disable_torch_grad_focal_loss": "stop_focus_gradient=True",
    "gamma": "gamma_neg=... and gamma_pos=...; both the same with clip=0 is focal loss",
    "alpha": "pos_weight=alpha / (1 - alpha) and weights=1 - alpha",
    "mask": "where=...",
    "target": "labels=...",
    "targets": "labels=...",
    "input": "logits=...",
    "ignore_index": "ignore_label=...",
    "sum_classes": "the loss is summed over the classes unless axis=() leaves the elements",
}
# Of functions that take a loss object, which has the hyper-parameters.
_OF_OBJECTS = dict.fromkeys(
    ("gamma", "alpha", "gamma_neg", "gamma_pos", "clip", "stop_focus_gradient", "disable_torch_grad_focal_loss"),
    "it at the loss object, FocalLoss(gamma=2.0, alpha=0.25) or AsymmetricLoss(gamma_neg=4.0) say",
)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def explains_foreign_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, which answers another library's name for an argument with what to write instead."""
    names = inspect.signature(function).parameters
    elsewhere = _ELSEWHERE | (_OF_OBJECTS if "loss" in names else {})

    @functools.wraps(function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in names and name in elsewhere:
                raise TypeError(f"{function.__name__} has no argument {name!r}; write {elsewhere[name]}")
        return function(*args, **kwargs)

    return explained
