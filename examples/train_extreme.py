"""Trains a classifier with a million labels on a synthetic corpus, without logits and without dense labels.

The corpus has a Zipf law over the labels and words that give each label away (extreme/corpus.py says how). The head is
asl_pallas.flax.MultilabelHead: its loss takes the ids of the positives and walks the labels a chunk at a time, and so
does the search for the best labels, by which precision at 1 and 5 is measured on held-out examples. At the end a table
has the memory of the train step, beside the same step with logits.

    pip install -e .[demo]
    python examples/train_extreme.py                                # a million labels, where memory allows
    python examples/train_extreme.py --labels 100000 --steps 50     # a minute or two on two CPU cores

This file holds the command line. What a session does is in extreme/session.py, model and train step are in
extreme/classifier.py.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from phenotypes.argument_types import number, whole
from phenotypes.errors import CannotRun
from phenotypes.interruption import Interruption


def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; exits with 2 and a sentence if one is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    pip")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--labels", type=whole(5), help="how many (1,000,000, or as many as memory allows)")
    parser.add_argument("--steps", type=whole(1), default=100, help="train steps (100)")
    parser.add_argument("--batch", type=whole(1), default=512, help="examples a step (512)")
    parser.add_argument("--width", type=whole(2), default=128, help="features that the head gets (128)")
    parser.add_argument("--vocabulary", type=whole(2), default=2**15, help="different words (32,768)")
    parser.add_argument("--learning-rate", type=number(0), default=0.01, help="Adafactor's (0.01)")
    parser.add_argument("--gamma-neg", type=number(0), default=4.0, help="the loss's focus on negatives (4)")
    parser.add_argument("--gamma-pos", type=number(0), default=1.0, help="the loss's focus on positives (1)")
    parser.add_argument("--clip", type=number(0, below=1), default=0.05, help="the loss's probability margin (0.05)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the head's products (float32 on the CPU, bfloat16 elsewhere); parameters are float32",
    )
    parser.add_argument("--held-out", type=whole(1), default=512, help="examples to measure precision on (512)")
    parser.add_argument("--evaluate-every", type=whole(1), metavar="STEPS", help="(a fifth of --steps)")
    parser.add_argument("--seed", type=whole(0), default=0, help="for the corpus and the parameters (0)")
    return parser.parse_args(arguments)


def main() -> None:
    options = command_line()
    with Interruption() as interruption:
        # jax and flax take seconds to import: --help and a mistyped flag answer at once, and Ctrl-C is under control.
        from extreme import session

        try:
            session.run(options, interruption)
        except CannotRun as error:
            sys.exit(f"{pathlib.Path(__file__).name}: {error}")
    if interruption.requested:
        sys.exit(Interruption.EXIT_CODE)


if __name__ == "__main__":
    main()
