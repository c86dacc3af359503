"""The README's code runs, and what it names exists."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_s_python_runs(capsys):
    *blocks, pod = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "make_mesh" in pod  # the last one is a sketch
    names: dict[str, Any] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    loss, wrong_label, at_zero, gap = capsys.readouterr().out.splitlines()
    assert float(loss) > 0
    assert wrong_label == "labels hold 2; expected 0 or 1 (`check` failed)"
    assert names["losses"].shape == names["ids"].shape[:1] == (3,)
    assert -1 < float(gap) < 1
    assert at_zero == "0.147" and "# 0.147: " in README
    assert names["loss"] > 0 and jnp.any(names["gradients"].kernel[...] != 0)
    assert names["focal"].shape == names["weak"].shape == names["hinge"].shape == (3,)
    for form in ("dense", "packed"):
        assert jnp.allclose(names["losses"], names["asymmetric_loss"](jnp.ones((3, 1000)), names[form]), rtol=1e-6)


def test_the_readme_s_files_exist():
    for name in re.findall(r"`((?:asl_pallas|reference|profiling|examples|tests|kernels)/[\w/.]*)`", README):
        assert any((root / name).exists() for root in (ROOT, ROOT / "asl_pallas")) or name.startswith("examples/output")


def test_the_readme_s_table_of_arguments_is_the_signature():
    import inspect

    from asl_pallas import asymmetric_loss

    table = README[README.index("| argument |") : README.index("Reverse mode differentiates")]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert named == list(inspect.signature(asymmetric_loss).parameters)


def test_importing_the_package_brings_in_nothing_but_jax_and_numpy():
    code = "import jax, numpy, sys; before = set(sys.modules); import asl_pallas; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    packages = {name.partition(".")[0] for name in found.split()}
    assert "asl_pallas" in packages
    # Nor Pallas, before a kernel is lowered: it takes as long to import as all the rest.
    assert not any(name.startswith("jax.experimental.pallas") for name in found.split())
    assert not packages & {"flax", "optax", "matplotlib", "rich", "sklearn", "pytest", "reference", "profiling"}


def test_the_reference_shares_no_code_with_the_package_either_way():
    for path in (ROOT / "reference").glob("*.py"):
        assert "asl_pallas" not in re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(), re.MULTILINE)
    for path in (ROOT / "asl_pallas").rglob("*.py"):
        assert "reference" not in re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(), re.MULTILINE)
