"""A whole session: corpus, training, precision, memory."""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from flax import nnx

from asl_pallas import AsymmetricLoss, SparseLabels
from extreme import classifier, memory
from extreme.corpus import Batch, Corpus, precision_at
from extreme.report import Point, Progress, print_curve, print_memory
from phenotypes.errors import CannotRun
from phenotypes.interruption import StopRequest

BEST = 5  # labels that are asked for


def run(options: argparse.Namespace, interruption: StopRequest) -> list[Point]:
    """Trains and reports what the command line asks for; returns the learning curve.

    Raises:
      CannotRun: with a sentence that says why.
    """
    started = time.perf_counter()
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    labels = choose_labels(options, console)
    corpus = Corpus(labels, options.vocabulary, options.seed)
    held_out = corpus.draw(np.random.default_rng([options.seed, 1]), options.held_out)
    popular = np.broadcast_to(corpus.by_rank[:BEST], (options.held_out, BEST))
    popularity = [precision_at(k, popular, held_out.labels) for k in (1, BEST)]
    console.print(
        f"{labels:,} labels, {options.vocabulary:,} words, {options.held_out:,} held-out examples; "
        f"the commonest labels for everyone: P@1 {popularity[0]:.3f}, P@5 {popularity[1]:.3f}"
    )
    trainer = Trainer(options, corpus)
    curve = train(trainer, corpus, held_out, options, interruption, console)
    if interruption.requested:
        console.print("Interrupted: here is what there is so far. Ctrl-C again leaves at once.")
    if trainer.compiled is None:
        console.print("Nothing has been trained yet: no tables.")
    else:
        print_curve(curve, popularity, console)
        resident = memory.peak_resident_bytes()  # before another compilation adds to it
        fused, unfused = trainer.memory()
        print_memory(fused, unfused, (options.batch, labels), resident, console)
    console.print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time")
    return curve


def choose_labels(options: argparse.Namespace, console: rich.console.Console) -> int:
    """As --labels says, or as many as memory allows, with a line that says why."""
    available = memory.available_bytes()
    sizes = (options.width, options.vocabulary, max(options.batch, options.held_out))
    labels = options.labels or memory.labels_that_fit(available, *sizes)
    needed = memory.needed_bytes(labels, *sizes) / memory.GIBIBYTE
    if available is None:
        console.print(f"Nothing says how much memory there is; training takes about {needed:.1f} GiB")
        return labels
    free = available / memory.GIBIBYTE
    if needed > free:
        flag = f"--labels {labels}" if options.labels else f"even {labels:,} labels"
        raise CannotRun(
            f"{flag} at --width {options.width}, --vocabulary {options.vocabulary}, --batch {options.batch} and "
            f"--held-out {options.held_out} would take about {needed:.1f} GiB, and {free:.1f} GiB are free"
        )
    chosen = "" if options.labels or labels == memory.SIZES[0] else f"{labels:,} labels instead of a million. "
    console.print(f"{chosen}Training takes about {needed:.1f} of the {free:.1f} GiB of memory that are free")
    return labels


class Trainer:
    """Classifier, optimizer and the compiled step between two steps."""

    def __init__(self, options: argparse.Namespace, corpus: Corpus):
        dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        self.model = classifier.Classifier(
            corpus.vocabulary,
            options.width,
            corpus.frequencies,
            AsymmetricLoss(options.gamma_neg, options.gamma_pos, options.clip),
            jnp.dtype(dtype),
            rngs=nnx.Rngs(options.seed),
        )
        self.optimizer = nnx.Optimizer(self.model, classifier.optimizer(options.learning_rate), wrt=nnx.Param)
        self.classes = corpus.labels
        self.compiled: Any = None
        self.sample: Batch | None = None  # the step is compiled for batches of its shape

    def step(self, batch: Batch) -> float:
        """Returns the loss. The first one compiles."""
        arrays = (jnp.asarray(batch.words), jax.tree.map(jnp.asarray, SparseLabels(batch.labels, self.classes)))
        if self.compiled is None:
            self.sample = batch
            self.compiled = classifier.train_step.lower(self.model, self.optimizer, *arrays).compile()
        return float(self.compiled(self.model, self.optimizer, *arrays))

    def precision(self, examples: Batch, batch: int) -> tuple[float, float]:
        """P@1 and P@5, `batch` examples at a time."""
        ranked = [
            np.asarray(classifier.best_labels(self.model, jnp.asarray(examples.words[i : i + batch]), BEST))
            for i in range(0, len(examples.words), batch)
        ]
        found = np.concatenate(ranked)
        return precision_at(1, found, examples.labels), precision_at(BEST, found, examples.labels)

    def memory(self) -> tuple[memory.StepMemory, memory.StepMemory]:
        """Of the step that has run, and of the same with logits, which is compiled and doesn't run."""
        assert self.sample is not None
        words, labels = self.sample.words, self.sample.labels
        dense = jax.ShapeDtypeStruct((len(words), self.classes), jnp.int8)
        unfused = classifier.unfused_train_step.lower(self.model, self.optimizer, jnp.asarray(words), dense).compile()
        state = nnx.state((self.model, self.optimizer))
        return memory.step_memory(self.compiled, state, labels), memory.step_memory(unfused, state, dense)


def train(
    trainer: Trainer,
    corpus: Corpus,
    held_out: Batch,
    options: argparse.Namespace,
    interruption: StopRequest,
    console: rich.console.Console,
) -> list[Point]:
    """A point before the first step, every few steps and after the last; an interruption ends it after a step.

    Raises:
      CannotRun: the loss isn't finite.
    """
    rng = np.random.default_rng([options.seed, 2])
    every = options.evaluate_every or max(1, options.steps // 5)
    curve: list[Point] = []
    losses: list[float] = []

    def look(steps: int) -> None:
        loss = float(np.mean(losses)) if losses else None
        curve.append(Point(steps, loss, *trainer.precision(held_out, options.batch)))
        losses.clear()
        progress.look(curve[-1])

    with Progress(console, options.steps) as progress:
        if not interruption.requested:
            look(0)
        for steps in range(1, options.steps + 1):
            if interruption.requested:
                break
            losses.append(trainer.step(corpus.draw(rng, options.batch)))
            progress.step(losses[-1], options.batch)
            if not np.isfinite(losses[-1]):
                raise CannotRun(
                    f"the loss is {losses[-1]:g} after {steps} steps: try a smaller --learning-rate than "
                    f"{options.learning_rate:g}"
                )
            if steps % every == 0:
                look(steps)
        if losses:
            look(curve[-1].steps + len(losses))
    return curve
