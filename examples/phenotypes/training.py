"""One training run: batches, schedule, progress, and a look at the validation split after each epoch."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
import rich.console
import rich.progress_bar
import rich.table
from jax.typing import ArrayLike

from asl_pallas import AsymmetricLoss, AsymmetryState, PackedLabels, SparseLabels, Statistics
from phenotypes import data, metrics
from phenotypes.groups import Split
from phenotypes.interruption import StopRequest
from phenotypes.layout import Layout
from phenotypes.progress import TrainingProgress
from phenotypes.settings import Focus, Sizes

FEATURE_DROPOUT = 0.1  # share of a disease's features left out whenever it is seen in training
WEIGHT_DECAY = 1e-2

# Micro average precision sorts every (disease, label) pair: 0.5 s for 256 diseases and 3 s for all of validation,
# too much for a run. The validation table takes these; the test table takes all.
CURVE_DISEASES = 256

# Steps from one that is counted to the next. On a TPU or a GPU each could be; on a CPU counting takes as long as the
# whole of a step without it.
COUNT_EVERY = 8

Labels = ArrayLike | PackedLabels | SparseLabels


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that all runs share."""

    diseases: data.Diseases
    split: Split
    sizes: Sizes
    ids: np.ndarray  # int32 (diseases, features)
    counts: np.ndarray  # of each label among the training diseases

    def labels(self, indices: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
        """0/1 labels as int8 (diseases, labels), or some of the columns."""
        return data.label_matrix([self.diseases.positives[i] for i in indices], len(self.diseases.labels), columns)

    def labels_as(self, form: str, indices: np.ndarray) -> Labels:
        """The same as "dense", "packed" or "sparse" labels, in the same shape for whatever diseases train."""
        if form == "dense":
            return self.labels(indices)
        positives = [self.diseases.positives[i] for i in indices]
        if form == "packed":
            return PackedLabels.from_ids(positives, self.sizes.labels)
        return SparseLabels.from_ids(positives, self.sizes.labels, self.most_positives)

    @functools.cached_property
    def most_positives(self) -> int:
        """Of a disease of the training split."""
        return max(len(self.diseases.positives[i]) for i in self.split.train)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line says of training."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    bias: Callable[[Focus], np.ndarray]
    labels: str = "dense"
    live: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run stood; `epoch` is a fraction where the run was stopped within one.

    Attributes:
      micro_average_precision: after the last epoch.
    """

    epoch: float
    train_loss: float
    precision_at_5: float
    micro_average_precision: float | None = None


class Step(NamedTuple):
    """What a train step tells.

    Attributes:
      loss: of its batch.
      statistics: what the loss's kernel counted, of a step that is to be `counted`.
      asymmetry: where the controller of gamma_neg is after it; None where there is none.
    """

    loss: jax.Array
    statistics: Statistics | None
    asymmetry: AsymmetryState | None = None


class Told(NamedTuple):
    """What a counted step tells, in Python's numbers, for a picture and a checkpoint's JSON; steps count from 1."""

    step: int
    probability_gap: float
    dropped_share: float
    positive_gradient_share: float
    gamma_neg: float

    @classmethod
    def of(cls, number: int, step: Step, focus: Focus) -> "Told":
        counted = step.statistics
        assert counted is not None
        shares = counted.probability_gap, counted.dropped_share, counted.positive_gradient_share
        gamma_neg = focus.gamma_neg if step.asymmetry is None else step.asymmetry.gamma_neg
        return cls(number, *map(float, (*shares, gamma_neg)))


class DivergedError(ArithmeticError):
    """A loss or a logit is infinite or NaN."""


class Trainer(Protocol):
    """NNXTrainer or LinenTrainer; `state` is the pytree of its parameters and its optimizer's arrays."""

    state: Any

    def step(
        self, ids: ArrayLike, labels: Labels, dropout_key: jax.Array, focus: Focus, counted: bool = False
    ) -> "Step": ...

    def logits(self, ids: ArrayLike) -> np.ndarray: ...


@dataclasses.dataclass
class Position:
    """Where a run stands between two steps: all that decides the rest of it, beside the trainer's state.

    Dropout's keys are folded from the seed and `steps`, so they need no field.

    Attributes:
      steps: taken so far.
      generator: numpy's random state before the shuffle of the epoch that `steps` is in.
      losses: of that epoch's steps so far.
      curve: of the epochs before it.
      seconds: spent so far.
      told: of the counted steps so far.
    """

    steps: int
    generator: dict[str, Any]
    losses: list[float] = dataclasses.field(default_factory=list)
    curve: list[Point] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    told: list[Told] = dataclasses.field(default_factory=list)


class Keeper(Protocol):
    """Keeps a run's positions and trainer states on disk."""

    def restore(self, trainer: Trainer) -> Position | None:
        """Gives the trainer its newest saved state; None and an untouched trainer if there is none."""
        ...

    def due(self, steps: int) -> bool:
        """Whether to save within an epoch, after so many steps."""
        ...

    def save(self, trainer: Trainer, position: Position) -> None: ...


@dataclasses.dataclass(frozen=True)
class Run:
    """A classifier as its training left it."""

    focus: Focus
    trainer: Trainer
    curve: list[Point]
    complete: bool
    seconds: float
    layout: Layout | None = None
    seed: int = 0
    told: list[Told] = dataclasses.field(default_factory=list)

    @property
    def loss(self) -> AsymmetricLoss:
        """With the gamma_neg of its last step."""
        return dataclasses.replace(self.focus.loss, gamma_neg=self.told[-1].gamma_neg) if self.told else self.focus.loss

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Float32 (diseases, labels), whole in every process."""
        return _logits(self.trainer, ids, self.layout)


def _logits(trainer: Trainer, ids: np.ndarray, layout: Layout | None) -> np.ndarray:
    return trainer.logits(ids) if layout is None else trainer.logits(layout.ids(ids))[: len(ids)]


def optimizer(learning_rate: float, epochs: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW, one epoch of warm-up, then a cosine down to 2 % of the peak.

    Its steps don't depend on the loss's scale, so that one learning rate serves all losses.
    """
    total = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(steps_per_epoch, total // 2),
        decay_steps=total,
        end_value=0.02 * learning_rate,
    )
    return optax.adamw(schedule, weight_decay=WEIGHT_DECAY)


def batches(
    problem: Problem, plan: Plan, rng: np.random.Generator, layout: Layout | None = None
) -> Iterator[tuple[ArrayLike, Labels]]:
    """One epoch: feature ids and labels of shuffled full batches; the odd diseases at the end wait.

    On a mesh a process makes what its devices need of a batch. All draw the same numbers for the whole of it.
    """
    order = rng.permutation(problem.split.train)
    for start in range(0, len(order) - plan.batch_size + 1, plan.batch_size):
        chosen = order[start : start + plan.batch_size]
        ids = problem.ids[chosen]
        kept = rng.random(ids.shape, np.float32) >= FEATURE_DROPOUT
        ids = np.where(kept, ids, data.PADDING)
        if layout is None:
            yield ids, problem.labels_as(plan.labels, chosen)
        else:
            block = functools.partial(_label_block, problem, chosen)
            yield layout.ids(ids), layout.labels(len(chosen), problem.sizes.labels, block)


def _label_block(problem: Problem, chosen: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    return problem.labels(chosen[rows], columns)


def train(
    problem: Problem,
    plan: Plan,
    focus: Focus,
    make_trainer: Callable[..., Trainer],
    interruption: StopRequest,
    console: rich.console.Console,
    keeper: Keeper | None = None,
    layout: Layout | None = None,
) -> Run:
    """Trains one classifier; the seed decides parameters, batches and dropout, so runs differ by their loss alone.

    The head's bias belongs to the loss, of which it is the optimum.

    An interruption ends it after the current step, with a last look at the validation split. A keeper is asked for an
    earlier position to go on from, and gets one after each epoch, where it is due, and at an interruption. With a
    layout all processes of the mesh have to call this alike.

    Raises:
      DivergedError: names the loss, the epoch and the learning rate.
    """
    steps_per_epoch = len(problem.split.train) // plan.batch_size
    total = plan.epochs * steps_per_epoch
    rng = np.random.default_rng(plan.seed)
    key = jax.random.key(plan.seed)
    to_make = (problem.sizes, plan.bias(focus), optimizer(plan.learning_rate, plan.epochs, steps_per_epoch), plan.seed)
    trainer = make_trainer(*to_make, layout=layout, controller=focus.controller)
    position = (keeper and keeper.restore(trainer)) or Position(0, dict(rng.bit_generator.state))
    watched = problem.split.validation
    watched_labels = problem.labels(watched)
    some = np.random.default_rng(0).permutation(len(watched))[:CURVE_DISEASES]

    started = time.perf_counter() - position.seconds

    def save() -> None:
        if keeper:
            position.seconds = time.perf_counter() - started
            keeper.save(trainer, position)

    with _Progress(console, f"{focus.name} {focus.numbers}", total, position.steps, plan.live) as progress:
        while position.steps < total and not interruption.requested:
            rng.bit_generator.state = position.generator
            losses = position.losses
            # An epoch that was begun before is shuffled and thinned out again from its start, and its first batches
            # aren't trained on twice.
            for ids, labels in itertools.islice(batches(problem, plan, rng, layout), len(losses), None):
                if interruption.requested:
                    break
                dropout_key = jax.random.fold_in(key, position.steps)
                counted = position.steps % COUNT_EVERY == 0
                on_mesh = dropout_key if layout is None else layout.key(dropout_key)
                step = trainer.step(ids, labels, on_mesh, focus, counted)
                losses.append(float(step.loss))
                position.steps += 1
                if counted:
                    position.told.append(Told.of(position.steps, step, focus))
                    progress.told = position.told[-1]
                progress.step(losses[-1], plan.batch_size)
                if keeper and len(losses) < steps_per_epoch and keeper.due(position.steps):
                    save()
                    progress.pause()
            if not losses:
                break
            whole = len(losses) == steps_per_epoch
            if not whole:
                save()  # before the last look, whose point on the curve an undisturbed run wouldn't have
            scores = _logits(trainer, problem.ids[watched], layout)
            if not (np.isfinite(losses).all() and np.isfinite(scores).all()):
                raise DivergedError(
                    f"{focus.name} {focus.numbers} diverged in epoch {position.steps / steps_per_epoch:g} (last loss "
                    f"{losses[-1]:g}): try a smaller --learning-rate than {plan.learning_rate:g}"
                )
            is_last = position.steps == total
            point = Point(
                epoch=position.steps / steps_per_epoch,
                train_loss=float(np.mean(losses)),
                precision_at_5=metrics.precision_at(5, scores, watched_labels),
                micro_average_precision=metrics.micro_average_precision(scores[some], watched_labels[some])
                if is_last
                else None,
            )
            position.curve.append(point)
            progress.epoch(point, plan.epochs)
            if whole:
                position.losses, position.generator = [], dict(rng.bit_generator.state)
                save()
    seconds = time.perf_counter() - started
    return Run(focus, trainer, position.curve, position.steps == total, seconds, layout, plan.seed, position.told)


class _Progress(TrainingProgress):
    """A plain line is an epoch's."""

    def __init__(self, console: rich.console.Console, name: str, steps: int, completed: int, live: bool):
        # All columns together fit 80 characters.
        super().__init__(
            console,
            "{task.description}",
            12,
            "5.1f",
            steps=steps,
            completed=completed,
            description=f"{name:16}",
            beneath=self._told if live else tuple,
        )
        self.name, self.live = name, live
        self.told: Told | None = None

    def _told(self) -> Iterator[rich.console.RenderableType]:
        """What the last step's statistics say, a line each."""
        if self.told is not None:
            grid = rich.table.Table.grid(padding=(0, 2))
            for name, number in self._numbers(self.told):
                grid.add_row(f"  {name.replace('_', ' ')}", f"{number:6.3f}", _scale(name, number))
            yield grid

    @staticmethod
    def _numbers(told: Told) -> Iterable[tuple[str, float]]:
        return [(name, number) for name, number in told._asdict().items() if name != "step"]

    def epoch(self, point: Point, epochs: int) -> None:
        precision = f"P@5 {point.precision_at_5:.3f}"
        self.show(
            precision,
            f"{self.name:18} epoch {point.epoch:g}/{epochs}  loss {point.train_loss:.3f}  "
            f"{self.rate:.0f} examples/s  validation {precision}",
        )
        if self.live and self.told is not None and not self.console.is_terminal:
            numbers = (f"{name.replace('_', ' ')} {number:.3f}" for name, number in self._numbers(self.told))
            self.console.print(f"{'':18} {'  '.join(numbers)}", soft_wrap=True)


def _scale(name: str, number: float) -> rich.console.RenderableType:
    """A bar for a share; a gap's goes from -1 to 1."""
    least, most = {"probability_gap": (-1.0, 1.0), "gamma_neg": (0.0, 10.0)}.get(name, (0.0, 1.0))
    return rich.progress_bar.ProgressBar(total=most - least, completed=number - least, width=30)
