"""A whole session: load, split, train each loss, compare."""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from phenotypes import baselines, checkpoints, cluster, data, groups, memory, metrics, report, settings, training
from phenotypes.errors import CannotRun
from phenotypes.interruption import Interruption, StopRequest
from phenotypes.layout import Layout
from phenotypes.linen_classifier import LinenTrainer
from phenotypes.nnx_classifier import NNXTrainer


def run(options: argparse.Namespace, interruption: StopRequest) -> int:
    """Trains and reports what the command line asks for; returns the process's exit code.

    All processes of a cluster call this alike. Only the first one prints, draws and writes the picture.

    Raises:
      CannotRun: with a sentence that says why.
    """
    started = time.perf_counter()
    first = jax.process_index() == 0
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 150, quiet=not first)
    layout = None
    if options.mesh is not None or options.coordinator is not None:
        layout = Layout.of(options.mesh)
        options.mesh = layout.name  # as the checkpoints have it
    problem = load(options, console)
    if layout is not None:
        cluster.check_alike(options, problem.diseases.release)
        layout.check(options.batch_size, problem.sizes.labels)
        console.print(f"Mesh {layout.name}: {layout.mesh.size} devices, {jax.process_count()} processes")
    plan = training.Plan(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        bias=functools.partial(settings.head_bias, options.head_bias, problem.counts, len(problem.split.train)),
        labels=options.labels,
        live=options.live,
    )

    results = report.Results()
    make_trainer = LinenTrainer if options.linen else NNXTrainer
    try:
        store = None
        if options.checkpoint_dir is not None:
            total = options.epochs * (len(problem.split.train) // options.batch_size)
            store = checkpoints.Store(options, problem.diseases.release, total, console)
        for focus in settings.to_train(options):
            for seed in range(options.seed, options.seed + options.seeds):
                if not interruption.requested:
                    name = f"{focus.name} {focus.numbers}" + (f", seed {seed}" if options.seeds > 1 else "")
                    keeper = None if store is None else store.keeper(name)
                    with_seed = dataclasses.replace(plan, seed=seed)
                    results.runs.append(
                        training.train(problem, with_seed, focus, make_trainer, interruption, console, keeper, layout)
                    )
    except (training.DivergedError, checkpoints.CheckpointError) as error:
        raise CannotRun(str(error)) from error

    interrupted = interruption.requested
    if interrupted:
        console.print("Interrupted: here is what there is so far. Ctrl-C again leaves at once.")
    # All processes take part in these, and only the first one in what takes long after them.
    validation, test = (problem.ids[side] for side in (problem.split.validation, problem.split.test))
    tested = [(run, run.logits(validation), run.logits(test)) for run in results.runs if run.curve]
    if first and results.has_curves():
        compare(problem, results, tested, options, console)
    elif first:
        console.print("Nothing has been trained yet: no table and no picture.")
    console.print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time")
    return Interruption.EXIT_CODE if interrupted else 0


def load(options: argparse.Namespace, console: rich.console.Console) -> training.Problem:
    """Diseases, split and features, with a line that says how many there are."""
    try:
        diseases = data.load()
    except data.MissingDataError as error:
        raise CannotRun(str(error)) from error
    group = groups.group_ids(diseases)
    if options.max_diseases is not None:
        diseases, group = groups.some(diseases, group, options.max_diseases)
    split = groups.split(group)
    if options.batch_size > len(split.train):
        raise CannotRun(f"--batch-size {options.batch_size} is more than the {len(split.train)} training diseases")
    sizes = settings.Sizes(labels=len(diseases.labels), fused_head=options.head == "fused")
    positives = sum(map(len, diseases.positives)) / len(diseases)
    console.print(
        f"Human Phenotype Ontology {diseases.release}: {len(diseases):,} diseases, {sizes.labels:,} labels, "
        f"{positives:.1f} positives a disease\n"
        f"{len(np.unique(group)):,} groups by name and gene: {len(split.train):,} diseases train, "
        f"{len(split.validation):,} validate, {len(split.test):,} test"
    )
    return training.Problem(
        diseases=diseases,
        split=split,
        sizes=sizes,
        ids=data.feature_ids(diseases, buckets=sizes.buckets, length=sizes.features),
        counts=data.label_counts([diseases.positives[i] for i in split.train], sizes.labels),
    )


def compare(
    problem: training.Problem,
    results: report.Results,
    tested: list[tuple[training.Run, np.ndarray, np.ndarray]],
    options: argparse.Namespace,
    console: rich.console.Console,
) -> None:
    """Validation table, memory, test table, and the picture, of the validation and test logits in `tested`."""
    split = problem.split
    scorers = {
        "popularity": lambda queries: baselines.popularity(problem.counts, len(queries)),
        "TF-IDF, 10-NN": lambda queries: baselines.nearest_neighbours(
            problem.diseases, split.train, queries, problem.counts
        ),
    }
    labels = problem.labels(split.validation)
    for name, scorer in scorers.items():
        results.validation[name] = metrics.precision_at(5, scorer(split.validation), labels)
    report.print_runs(results, options.epochs, console)

    for batch in (options.batch_size, 16 * options.batch_size):
        results.memory.append(memory.loss_step_memory(batch, problem.sizes.labels, settings.ASL_DEFAULT))
    report.print_memory(results, console)

    test_labels = problem.labels(split.test)
    for name, scorer in scorers.items():
        results.test[name] = [metrics.evaluate(scorer(split.test), test_labels)]
    for run, on_validation, scores in tested:
        sigmoid = np.asarray(jax.nn.sigmoid(scores))
        link = np.asarray(run.loss.probability(jnp.asarray(scores)))
        found = dataclasses.replace(
            metrics.evaluate(scores, test_labels),
            f1=metrics.micro_f1(scores, test_labels, metrics.best_threshold(on_validation, labels)),
            sigmoid_error=metrics.reliability(sigmoid, test_labels).error,
            link_error=metrics.reliability(link, test_labels).error,
        )
        results.test.setdefault(report.run_name(run, options.epochs), []).append(found)
        if run.seed == options.seed:
            bins = report.RELIABILITY_BINS
            results.reliability[run.focus] = (
                metrics.reliability(sigmoid, test_labels, bins),
                metrics.reliability(link, test_labels, bins),
            )
    report.print_test(results, len(split.test), console)
    report.draw(results, options.output)
    console.print(f"Picture: {options.output}", soft_wrap=True)
