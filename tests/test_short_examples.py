"""The examples of one screen run as they stand, and what they print is what they are for."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


def numbers_of(name: str, pattern: str, *arguments: str) -> list[float]:
    """What the pattern finds in the example's output, line by line."""
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert ran.returncode == 0, ran.stderr
    return [float(number) for number in re.findall(pattern, ran.stdout)]


def test_quickstart_nnx_learns():
    before, *_, after = numbers_of("quickstart_nnx.py", r"precision at 5(?: before:)? ([\d.]+)")
    assert before < 0.1 and after > 0.85


@pytest.mark.long
def test_quickstart_linen_learns():
    first, *_, last = numbers_of("quickstart_linen.py", r"loss ([\d.]+)")
    assert last < 0.8 * first


@pytest.mark.long
def test_plain_jax_brings_the_gap_near_its_target():
    first, *_, last = numbers_of("plain_jax.py", r"probability gap (-?[\d.]+)")
    assert abs(last - 0.1) < abs(first - 0.1) / 2


@pytest.mark.long
def test_partial_labels_as_weak_negatives_count_best():
    truth, as_negatives, left_out, weak = numbers_of("partial_labels.py", r"([\d.]+) labels per example")
    assert abs(weak - truth) < abs(as_negatives - truth) < abs(left_out - truth)


@pytest.mark.long
def test_a_head_of_many_labels_learns_its_batch():
    assert numbers_of("million_labels.py", r"precision at 5: ([\d.]+)", "--labels", "65536") == [1.0]


@pytest.mark.long
def test_a_mesh_trains():
    first, *_, last = numbers_of("pod.py", r"loss ([\d.]+)")
    assert last < 0.9 * first


@pytest.mark.long
def test_what_is_served_is_above_its_threshold():
    shown = numbers_of("serve.py", r"\((0\.\d+)\)")
    assert len(shown) == 10 and min(shown) > 1 / 6


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_a_screen(path):
    is_application = path.name.startswith(("train_", "compare_"))
    assert is_application or len(path.read_text().splitlines()) <= 60
