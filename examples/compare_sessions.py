"""Compares the loss curves of two sessions: of one process and of two, say, or before and after a change.

    python examples/train_phenotypes.py --epochs 1 --checkpoint-dir A
    python examples/train_phenotypes.py --epochs 1 --checkpoint-dir B --processes 2
    python examples/compare_sessions.py A B

Reads the positions in the checkpoints that both have, and prints the largest relative difference of the losses in each:
of the epochs' means, and of the single steps of an epoch that wasn't complete. No array is read.
"""

import json
import pathlib
import sys


def steps(folder: pathlib.Path) -> set[int]:
    """Of the complete checkpoints; a kill may leave one that was being written or deleted."""
    names = (path.parent.parent.name for path in folder.glob("*/session/metadata"))
    return {int(name) for name in names if name.isdecimal()}


def losses(checkpoint: pathlib.Path) -> tuple[str, list[float]]:
    """A checkpoint's run, and its epochs' mean losses followed by its last epoch's steps'."""
    session = json.loads((checkpoint / "session" / "metadata").read_text())
    position = session["position"]
    return session["run"], [*(point["train_loss"] for point in position["curve"]), *position["losses"]]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: compare_sessions.py CHECKPOINT-DIR CHECKPOINT-DIR")
    first, second = map(pathlib.Path, sys.argv[1:])
    common = sorted(steps(first) & steps(second))
    if not common:
        sys.exit(f"compare_sessions.py: {first} and {second} have no checkpoint of the same step")
    for step in common:
        (run, ours), (other_run, theirs) = losses(first / str(step)), losses(second / str(step))
        if run != other_run or len(ours) != len(theirs):
            sys.exit(f"compare_sessions.py: {first / str(step)} and {second / str(step)} are of different sessions")
        largest = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        print(
            f"{run:18} step {step:6}  last loss {ours[-1]:.5f} and {theirs[-1]:.5f}, largest difference {largest:.1e}"
        )


if __name__ == "__main__":
    main()
