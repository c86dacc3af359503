"""Random calls of the public functions against float64.

    python -m tests.random_calls --calls 100000
    python -m tests.random_calls --seed 3 --only 17      # one configuration of it

A configuration, all that a call knows before it is traced, is compiled once and called with many draws of data. Each
call's loss and gradients are compared in full, at the bound of `cases`: an error of at most 1.5 times the careful
float32 version's plus 1e-6, in units of max(1, |truth|).
"""

# The modules beside this one are found once their folder is on the path.
# ruff: noqa: E402
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import cases
import jax
import jax.numpy as jnp
import numpy as np
import random_configurations
import random_data
from random_configurations import Configuration
from random_data import Data
from random_family import truth_of
from random_truth import wrong_top_k

import asl_pallas

CLEAR_EVERY = 100  # configurations: compiled programs add up


@dataclasses.dataclass(frozen=True)
class Failure:
    seed: int
    number: int
    config: Configuration
    sentence: str

    def __str__(self) -> str:
        return f"python -m tests.random_calls --seed {self.seed} --only {self.number}: {self.sentence} [{self.config}]"

    @property
    def cause(self) -> str:
        """The sentence without its numbers, to count alike ones."""
        return re.sub(r"[-+]?\d[\d.e+-]*|\([^)]*\)|nan|inf", "#", self.sentence.splitlines()[0])[:110]


def check(seed: int, number: int, config: Configuration) -> tuple[int, Failure | None]:
    """Runs the configuration of that number; how many calls were compared, and what was wrong."""
    with jax.enable_x64(config.x64):
        data = random_data.draw(config, seed, number)
        calls, sentence = 0, ""
        try:
            found = _run(config, data)
            calls = config.draws
            with np.errstate(all="ignore"):
                sentence = _compare(config, data, found)
        except NotImplementedError as error:  # what a kernel by name says of a call that it can't serve
            sentence = "" if config.implementation in cases.KERNELS else f"NotImplementedError: {error}"
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}"
    return calls, Failure(seed, number, config, sentence) if sentence else None


def _compare(config: Configuration, data: Data, found: dict[str, Any]) -> str:
    """What is wrong, or an empty string."""
    if config.function == "linear_top_k":
        return wrong_top_k(config, data, found["value"], found["ids"])[1]
    truth = truth_of(config, data)
    sentences = []
    if "value" in found:
        if found["value"].dtype != (np.float64 if truth.double else np.float32):
            return f"loss has dtype {found['value'].dtype}"
        sentences.append(truth.wrong_values(found["value"])[1])
    gradients = found.get("gradients")
    if gradients is None:
        return sentences[0]
    if config.mode == "others":
        sentences.append(truth.wrong_other_gradients(gradients)[1])
    elif config.is_head:
        sentences.append(truth.wrong_head_gradients(gradients)[1])
    else:
        gradient = gradients["logits"]
        if gradient.dtype != data.inputs["logits"].dtype:
            return f"gradient has dtype {gradient.dtype}"
        sentences.append(truth.wrong_gradient(gradient)[1])
    return "; ".join(filter(None, sentences))


def _run(config: Configuration, data: Data) -> dict[str, Any]:
    """The results of all draws, stacked."""
    function = _function(config)
    results: list[Any] = []
    with _context(config):
        if not config.mapped:
            call = jax.jit(function) if config.jit else function
            for i in range(config.draws):
                results.append(jax.tree.map(np.asarray, call(*data.take(config, i))))
            return jax.tree.map(lambda *parts: np.stack(parts), *results)
        call = jax.vmap(function, _in_axes(config, data))
        call = jax.jit(call) if config.jit else call
        for start in range(0, config.draws, config.mapped):
            which = slice(start, start + config.mapped)
            results.append(jax.tree.map(np.asarray, call(*data.take(config, which))))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


@contextlib.contextmanager
def _context(config: Configuration) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(cases.interpreted(config.implementation))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        if config.strict:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


def _in_axes(config: Configuration, data: Data) -> tuple[Any, ...]:
    def axis(name: str) -> int | None:
        return None if name in config.shared else 0

    dynamic = {name: axis(name) for name in (*data.arrays, *data.vectors, *data.scalars)}
    return {name: axis(name) for name in data.inputs}, axis("labels"), dynamic, 0


def _function(config: Configuration) -> Callable[..., dict[str, Any]]:
    known = dict(zip(config.names, config.hyperparameters[0], strict=True))
    known = {name: number for name, number in known.items() if name not in config.traced | config.by_class}
    function = getattr(asl_pallas, config.function)

    def loss(inputs: dict[str, Any], labels: Any, dynamic: dict[str, Any]) -> Any:
        if not config.takes_object:
            return function(**inputs, labels=labels, **config.options, **known, **dynamic)
        own = {name: value for name, value in dynamic.items() if name in config.names}
        others = {name: value for name, value in dynamic.items() if name not in config.names}
        its_loss = config.kind.make(**known, **own, **config.settings)
        return function(its_loss, **inputs, labels=labels, **config.options, **others)

    def value(inputs: Any, labels: Any, dynamic: Any, cotangent: Any) -> dict[str, Any]:
        return {"value": loss(inputs, labels, dynamic)}

    def top_k(inputs: Any, labels: Any, dynamic: Any, cotangent: Any) -> dict[str, Any]:
        scores, ids = function(**inputs, **config.options)
        return {"value": scores, "ids": ids}

    def vjp(inputs: Any, labels: Any, dynamic: Any, cotangent: Any) -> dict[str, Any]:
        result, pull = jax.vjp(lambda inputs: loss(inputs, labels, dynamic), inputs)
        return {"value": result, "gradients": pull(jnp.asarray(cotangent, result.dtype))[0]}

    def grad(inputs: Any, labels: Any, dynamic: Any, cotangent: Any) -> dict[str, Any]:
        def weighted(inputs: Any) -> Any:
            result = loss(inputs, labels, dynamic)
            return jnp.sum(result * jnp.asarray(cotangent, result.dtype))

        return {"gradients": jax.grad(weighted)(inputs)}

    def others(inputs: Any, labels: Any, dynamic: Any, cotangent: Any) -> dict[str, Any]:
        names = [n for n in ("weights", "pos_weight") if n in dynamic and "int" not in config.arrays[n][1]]
        asked = {name: jnp.asarray(dynamic[name]) for name in names}
        asked |= {"labels": jnp.asarray(labels)} if config.soft else {}

        def by_others(asked: dict[str, Any]) -> Any:
            given = asked.get("labels", labels)
            return loss(inputs, given, dynamic | {name: asked[name] for name in names})

        result, pull = jax.vjp(by_others, asked)
        return {"value": result, "gradients": pull(jnp.asarray(cotangent, result.dtype))[0]}

    if config.function == "linear_top_k":
        return top_k
    return {"value": value, "vjp": vjp, "grad": grad, "others": others}[config.mode]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_calls", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="how many to compare (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of CPU time, after which it stops")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th configuration from the i-th on")
    parser.add_argument("--only", type=int, nargs="+", help="the configurations of these numbers alone")
    parser.add_argument("--failures", type=int, default=10, help="print so many in full (default %(default)s)")
    options = parser.parse_args(arguments)
    # The bound is float32's, and a GPU's default for the head's products isn't.
    jax.config.update("jax_default_matmul_precision", "highest")
    share, shares = map(int, options.share.split("/"))
    numbers = iter(options.only) if options.only else iter(range(share, sys.maxsize, shares))
    configurations = calls = 0
    by_loss: collections.Counter[str] = collections.Counter()
    failures: list[Failure] = []
    for number in numbers:
        if calls * (1 if options.only else shares) >= options.calls or time.process_time() > 60 * options.minutes:
            break
        config = random_configurations.draw(options.seed, number)
        compared, failure = check(options.seed, number, config)
        configurations, calls = configurations + 1, calls + compared
        by_loss[config.loss if config.takes_object else config.function] += compared
        if failure:
            failures.append(failure)
            if len(failures) <= options.failures:
                print(failure, flush=True)
        if configurations % CLEAR_EVERY == 0:
            jax.clear_caches()
            cases._careful_side.cache_clear()
    print(
        f"{configurations} configurations, {calls} calls, {len(failures)} of the configurations failed; "
        f"{time.process_time():.0f} s of CPU time"
    )
    print("  " + ", ".join(f"{loss} {count}" for loss, count in sorted(by_loss.items())))
    causes: dict[str, list[int]] = {}
    for failure in failures:
        causes.setdefault(failure.cause, []).append(failure.number)
    for cause, those in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"  {len(those):4} {cause}: --only {' '.join(map(str, those[:6]))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
