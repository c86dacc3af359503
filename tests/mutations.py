"""How many small faults in asl_pallas/ the tests notice.

    python -m pytest tests --executed-lines lines.json      # once: which test executes which lines
    python tests/mutations.py --lines lines.json --results mutations.jsonl --count 200

A mutation is tried on the short suite's tests that execute its line, the cheapest first, until one of them fails, and
if none does on the long suite's. The results file is added to: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, draw

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("asl_pallas", "tests", "reference", "profiling", "examples", "pyproject.toml", "README.md", "Makefile")
HANGS = 10  # times as long as the tests took, and a minute: then it has hung, which is noticed
ORDER = "ASL_PALLAS_TESTS_IN_ORDER"
FEW = 25  # tests at first, since most mutations are noticed by any


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin of the mutated tree's pytest: the tests asked for, in that order."""
    by_name = {item.nodeid: item for item in items}
    wanted = json.loads(Path(os.environ[ORDER]).read_text())
    items[:] = [by_name[name] for name in wanted if name in by_name]


def tests_for(mutant: Mutant, tests: dict[str, Any], is_long: bool) -> list[str]:
    """Those that execute one of its lines, or for lines that run at import those that execute any of the file's."""
    touched = set(range(mutant.line, mutant.end_line + 1))
    usable = {name: test for name, test in tests.items() if test["passed"] and test.get("lines")}
    executed = {name: set(test["lines"].get(mutant.file, ())) for name, test in usable.items()}
    if any(lines & touched for lines in executed.values()):
        chosen = [name for name, lines in executed.items() if lines & touched]
    else:
        chosen = [name for name, lines in executed.items() if lines]
    chosen = [name for name in chosen if usable[name]["long"] == is_long]
    return sorted(chosen, key=lambda name: usable[name]["seconds"])


class Tree:
    """A copy of what the tests need, whose package is mutated in place."""

    def __init__(self, folder: Path):
        self.root = folder
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "output")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)

    def first_failure(self, mutant: Mutant, names: list[str], seconds: float) -> str | None:
        """The test that notices the mutant, "hangs" or "import"; None where all pass."""
        path = self.root / mutant.file
        source = path.read_text()
        path.write_text(mutant.apply(source))
        try:
            return self._run(names, 60 + HANGS * seconds)
        finally:
            path.write_text(source)

    def _run(self, names: list[str], limit: float) -> str | None:
        order, said = self.root / "order.json", self.root / "said.txt"
        order.write_text(json.dumps(names))
        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        process = PROCESSES.Process(target=_run_pytest, args=(str(self.root), str(order), str(said), files))
        process.start()
        process.join(limit)
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            return "hangs"
        if process.exitcode in (0, 5):
            return None
        failed = [line for line in said.read_text().splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"import (exit code {process.exitcode})"


# Forked from a process that has imported what takes seconds, and nothing of ours.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["jax.numpy", "jax.experimental.pallas.tpu", "flax.nnx", "optax", "scipy.sparse"]


def _run_pytest(root: str, order: str, said: str, files: list[str]) -> None:
    os.setsid()
    os.chdir(root)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {ORDER: order, "PYTHONPATH": f"{root}{os.pathsep}{root}/tests"}
    sys.path[:] = [root, f"{root}/tests", *(path for path in sys.path if not path.startswith(str(ROOT / "tests")))]
    # A compiled file is told from another by its time in seconds and its size: a mutation may change neither.
    sys.dont_write_bytecode = True
    flags = ["-x", "-q", "-rfE", "-n", "0", "--tb=line", "-m", "not gpu and not tpu"]
    flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*flags, "-p", "mutations", "-p", "no:cacheprovider", *files])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(status))


def judge(tree: Tree, mutant: Mutant, tests: dict[str, Any], most_seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    result: dict[str, Any] = {"name": mutant.name, "file": mutant.file, "line": mutant.line, "kind": mutant.kind}
    result |= {"diff": mutant.diff((ROOT / mutant.file).read_text()), "noticed": None, "test": None, "tests": 0}
    for suite in ("short", "long"):
        names = tests_for(mutant, tests, is_long=suite == "long")
        within, total = [], 0.0
        for name in names:
            total += tests[name]["seconds"]
            if total > most_seconds:
                break
            within.append(name)
        result["tests"] += len(within)
        for part in (within[:FEW], within[FEW:]):
            failed = part and tree.first_failure(mutant, part, sum(tests[name]["seconds"] for name in part))
            if failed:
                return result | {"noticed": suite, "test": failed, "seconds": round(time.monotonic() - started, 1)}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def table(results: list[dict[str, Any]]) -> str:
    files = sorted({result["file"] for result in results})
    head = f"{'file':36} {'mutations':>9} {'short':>6} {'long':>6} {'neither':>8} {'no test':>8}"
    lines = [head]
    for file in (*files, "all"):
        those = [result for result in results if file in (result["file"], "all")]
        by_short, by_long, by_none = (sum(r["noticed"] == suite for r in those) for suite in ("short", "long", None))
        untested = sum(result["noticed"] is None and not result["tests"] for result in those)
        lines.append(f"{file:36} {len(those):9} {by_short:6} {by_long:6} {by_none:8} {untested:8}")
    for title, suite in (("Noticed by the long suite alone", "long"), ("Noticed by neither", None)):
        lines.append(f"\n{title}:")
        for result in results:
            if result["noticed"] == suite:
                by = f", noticed by {result['test']}" if suite else f" after {result['tests']} tests"
                lines.append(f"\n{result['file']}:{result['line']} {result['kind']}{by}\n{result['diff']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lines", type=Path, required=True, help="what pytest --executed-lines wrote")
    parser.add_argument("--results", type=Path, required=True, help="a line of JSON for each mutation")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no mutation after that")
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="of tests for a mutation and suite")
    parser.add_argument("--table", action="store_true", help="print what is known, and run nothing")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    PROCESSES.set_forkserver_preload(PRELOADED)
    mutants = draw(ROOT, options.count, options.seed)
    tests = json.loads(options.lines.read_text())
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {result["name"] for result in known}
    left = [mutant for mutant in mutants if mutant.name not in done]
    end = time.monotonic() + 60 * options.budget_minutes
    writing = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees: queue.Queue[Tree] = queue.Queue()
        for job in range(0 if options.table else options.jobs):
            (Path(folder) / str(job)).mkdir()
            tree = Tree(Path(folder) / str(job))
            cheap = sorted((test["seconds"], name) for name, test in tests.items() if test["passed"])
            if failed := tree._run([name for _, name in cheap[:FEW]], 600):
                raise SystemExit(f"without any mutation: {failed}")
            trees.put(tree)

        def one(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            tree = trees.get()
            try:
                result = judge(tree, mutant, tests, options.most_seconds)
            finally:
                trees.put(tree)
            with writing, options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
                print(
                    f"{result['file']}:{result['line']} {result['kind']}: {result['noticed']} {result['test']}",
                    flush=True,
                )
                known.append(result)

        if not options.table:
            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(one, left))
    names = {mutant.name for mutant in mutants}
    print(table([result for result in known if result["name"] in names]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
