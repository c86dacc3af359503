"""What the package brings in, and what it shares."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


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
