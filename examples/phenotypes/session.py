"""A whole session: load, split, train each loss, compare."""

import argparse
import sys
import time

import numpy as np
import rich.console

from phenotypes import baselines, checkpoints, data, groups, memory, metrics, report, settings, training
from phenotypes.interruption import Interruption
from phenotypes.linen_classifier import LinenTrainer
from phenotypes.nnx_classifier import NNXTrainer


class CannotRun(Exception):
    """Data, options or a checkpoint can't be used, or training diverged; the message is for the user."""


def run(options: argparse.Namespace, interruption: Interruption) -> int:
    """Trains and reports what the command line asks for; returns the process's exit code.

    Raises:
      CannotRun: with a sentence that says why.
    """
    started = time.perf_counter()
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    problem = load(options, console)
    plan = training.Plan(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        bias=settings.head_bias(options.head_bias, problem.counts, len(problem.split.train)),
    )

    results = report.Results()
    make_trainer = LinenTrainer if options.linen else NNXTrainer
    try:
        store = None
        if options.checkpoint_dir is not None:
            total = options.epochs * (len(problem.split.train) // options.batch_size)
            store = checkpoints.Store(options, problem.diseases.release, total, console)
        for focus in settings.to_train(options):
            if not interruption.requested:
                keeper = None if store is None else store.keeper(f"{focus.name} {focus.numbers}")
                results.runs.append(training.train(problem, plan, focus, make_trainer, interruption, console, keeper))
    except (training.DivergedError, checkpoints.CheckpointError) as error:
        raise CannotRun(str(error)) from error
    results.chosen = report.chosen_on_validation(results.runs)

    if interruption.requested:
        console.print("Interrupted: here is what there is so far. Ctrl-C again leaves at once.")
    if results.has_curves():
        compare(problem, results, options, console)
    else:
        console.print("Nothing has been trained yet: no table and no picture.")
    console.print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time")
    return Interruption.EXIT_CODE if interruption.requested else 0


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
    sizes = settings.Sizes(labels=len(diseases.labels))
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
    problem: training.Problem, results: report.Results, options: argparse.Namespace, console: rich.console.Console
) -> None:
    """Validation table, memory, picture, and last and slowest the test table."""
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
    report.draw(results, options.output)
    console.print(f"Picture: {options.output}", soft_wrap=True)

    labels = problem.labels(split.test)
    for name, scorer in scorers.items():
        results.test[name] = metrics.evaluate(scorer(split.test), labels)
    for run in results.runs:
        default = run.focus == settings.ASL_DEFAULT
        if run.curve and (run.focus.name != "ASL" or default or run is results.chosen):
            # The other ASL settings never meet the test groups: validation has chosen.
            name = report.run_name(run, options.epochs) + (", the paper's" if default else "")
            name += ", chosen" if results.searched and run is results.chosen else ""
            results.test[name] = metrics.evaluate(run.trainer.logits(problem.ids[split.test]), labels)
    report.print_test(results, len(split.test), console)
