"""python -m profiling: what it measures, what it says when something is missing or crashes, and what it keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from test_compiled import available

from asl_pallas import AsymmetricLoss, asymmetric_loss, kernels
from profiling import (
    __main__,
    cases,
    contenders,
    head,
    local,
    memory,
    on_chip,
    parity,
    plots,
    readme,
    report,
    results,
    schedule,
    session,
    speed,
    tables,
    targets,
    torch_peers,
)
from profiling.contenders import Contender
from profiling.results import Row
from profiling.session import Request, Session

SMALL = "64x80-f32-int8"
ONCE = ["--target", "local", "--case", SMALL]


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without torch, which has tests of its own."""
    monkeypatch.setattr(torch_peers, "missing", lambda: f"torch is not installed: {torch_peers.INSTALL}")


@pytest.fixture
def add_contender(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    def add(name: str, build: Callable[[], Any]) -> None:
        fresh = Contender(name, name, contenders.ASL, build)
        monkeypatch.setattr(contenders, "CONTENDERS", (*contenders.CONTENDERS, fresh))

    return add


def crashing() -> Any:
    raise RuntimeError("no such kernel")


@pytest.mark.long
def test_every_contender_computes_the_loss_that_it_says():
    (case,) = cases.select([SMALL])
    logits, labels = jax.device_put(case.arrays())
    totals: dict[str, list[float]] = {}
    for contender in contenders.at(cases.CPU, contenders.CONTENDERS):
        if contender.missing(cases.CPU) is None:
            value, slope = jax.jit(contenders.step(contender.build(), cases.GRADIENT))(logits, labels)
            totals.setdefault(contender.loss, []).append(float(value))
            assert slope.shape == case.shape and bool(jnp.isfinite(slope).all())
    assert len(totals[contenders.ASL]) == 5 and len(totals) == 3
    np.testing.assert_allclose(totals[contenders.ASL], totals[contenders.ASL][0], rtol=1e-5)


def test_parity_says_why_a_kernel_does_not_serve_and_does_not_call_it_broken(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "refusal", lambda *_: "it is for newer chips")
    assert __main__.main(["parity", "--quick", "--json", "--only", "ours-mosaic_gpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["status"], row["note"]) for row in rows} == {(results.UNSERVED, "it is for newer chips")}


@pytest.mark.long
def test_parity_passes_on_the_tree_and_fails_once_a_line_of_the_formula_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(parity, "DTYPES", ("float32", "bfloat16"))
    command = ["parity", "--quick", "--json", "--only", "ours-xla"]
    assert __main__.main(command) == 0
    assert all(row["figures"]["holds"] for row in json.loads(capsys.readouterr().out)["rows"])
    right = AsymmetricLoss.value_and_slope

    def wrong(self: Any, *arguments: Any) -> Any:
        value, slope = right(self, *arguments)
        return value, slope * 1.001

    jax.clear_caches()
    monkeypatch.setattr(AsymmetricLoss, "value_and_slope", wrong)
    try:
        assert __main__.main(command) == 1
    finally:
        monkeypatch.undo()
        jax.clear_caches()
    broken = [row for row in json.loads(capsys.readouterr().out)["rows"] if not row["figures"]["holds"]]
    assert broken and all(row["note"].startswith("beyond the bound at logit") for row in broken)


@pytest.mark.long
def test_check_takes_any_function_of_the_same_face():
    few: dict[str, Any] = {"dtypes": ("float32",), "settings": parity.SETTINGS[:2]}
    verdict = parity.check(asymmetric_loss, **few)
    assert verdict.holds
    assert {row.mode for row in verdict.rows} == set(parity.REGIONS)
    assert "careful" in str(verdict)

    def naive(x: Any, y: Any, *, gamma_neg: float, gamma_pos: float, clip: float, axis: Any) -> Any:
        p = jax.nn.sigmoid(x)
        p_m = jnp.maximum(p - clip, 0)
        positive, negative = -jnp.log(p) * (1 - p) ** gamma_pos, -jnp.log(1 - p_m) * p_m**gamma_neg
        return jnp.where(y > 0, positive, negative).sum(axis)

    broken = parity.check(naive, **few)
    assert not broken.holds
    assert {row.mode for row in broken.rows if row.broken} >= {"left tail", "infinities"}

    def raises(*_: Any, **__: Any) -> Any:
        raise KeyError("what now")

    (row,) = parity.check(raises, **few).rows
    assert (row.status, row.note) == (results.FAILED, "KeyError: 'what now'")
    with pytest.raises(ValueError, match="expected among float32, bfloat16"):
        parity.check(asymmetric_loss, dtypes=("int8",))


@pytest.mark.parametrize(
    ("option", "known"), [("--case", cases.CASES[0].name), ("--only", "closed-form"), ("--target", "tpu7x")]
)
def test_an_unknown_name_gets_the_list_of_those_there_are(capsys, option, known):
    assert __main__.main(["memory", option, "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "'nonsense'" in said and known in said


def test_without_a_subcommand_it_says_what_there_is(capsys):
    assert __main__.main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in __main__.COMMANDS)


@pytest.mark.long
def test_a_crashing_contender_has_a_row_with_its_error_and_the_rest_goes_on(add_contender, monkeypatch, capsys):
    monkeypatch.setattr(speed, "QUICK_ROUNDS", 7)
    add_contender("crashes", crashing)
    for command in ("memory", "speed"):
        arguments = [command, "--quick", "--json", *ONCE, "--only", "crashes,optax-bce", "--only", "torch-asl"]
        assert __main__.main(arguments) == 1
        document = json.loads(capsys.readouterr().out)
        rows = {row["contender"]: row for row in document["rows"]}
        assert rows["crashes"]["status"] == "failed" and rows["crashes"]["note"] == "RuntimeError: no such kernel"
        assert rows["optax-bce"]["status"] == "measured"
        assert rows["torch-asl"]["status"] == "missing" and "pip install" in rows["torch-asl"]["note"]


def test_a_missing_compiler_is_a_row_that_says_what_to_install(monkeypatch, capsys):
    def missing(target: str) -> Any:
        raise targets.MissingCompiler(f"no compiler for {target}: pip install something")

    monkeypatch.setattr(targets, "device", missing)
    for command in ("memory", "schedule"):
        arguments = [command, "--json", "--target", "v5e,h100", "--case", cases.ON_CHIP.name, "--only", "closed-form"]
        assert __main__.main(arguments) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert {row["device"] for row in rows} == {"v5e", "h100"}
        assert all(row["status"] == "missing" and "pip install something" in row["note"] for row in rows)


@pytest.mark.long
def test_json_has_figures_with_device_versions_date_and_command(capsys):
    arguments = ["memory", "--json", *ONCE, "--only", "ours-xla"]
    assert __main__.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == results.SCHEMA
    ((key, run),) = document["runs"].items()
    assert run["machine"] and run["versions"]["jax"] == jax.__version__ and run["date"] == key
    assert run["command"] == "python -m profiling " + " ".join(arguments)
    assert {row["mode"] for row in document["rows"]} == set(cases.MODES)
    for row in document["rows"]:
        assert (row["run"], row["device"], row["case"]) == (key, local.slug(), SMALL)
        figures = row["figures"]
        assert figures["temporaries"] >= 0 and figures["traffic"] >= figures["floor"] > 0
        # A process that is this small may find all that it needs in pages that it has.
        assert figures["peak"] is None or figures["peak"] >= 0


def row_of(contender: str, mode: str = cases.GRADIENT, **figures: Any) -> results.Row:
    return results.Row("memory", "some-device", SMALL, contender, mode, figures)


def test_a_smaller_run_replaces_its_own_rows_and_leaves_the_others_with_their_run(tmp_path):
    first = results.Run("2026-01-01", "python -m profiling report", "a machine", {"jax": "1"}, "abc")
    second = dataclasses.replace(first, date="2026-01-02")
    third = dataclasses.replace(first, date="2026-01-03")
    results.save([row_of("a", peak=1), row_of("b", peak=float("inf"))], first, tmp_path)
    (path,) = results.save([row_of("a", peak=3)], second, tmp_path)
    left_out = dataclasses.replace(row_of("a"), status=results.LEFT_OUT, note="--quick")
    results.save([left_out], third, tmp_path)
    document = results.load(path)
    rows = document.rows_of(SMALL, cases.GRADIENT)
    assert (rows["a"].figures["peak"], rows["a"].run) == (3, second.key)
    assert (rows["b"].figures["peak"], rows["b"].run) == (None, first.key)
    assert document.runs == {first.key: first, second.key: second}


def test_the_head_is_measured_beside_the_one_with_logits(monkeypatch, tmp_path):
    monkeypatch.setattr(head, "ON_CPU", (4, 8, 300))
    monkeypatch.setattr(head, "ROUNDS", 2)
    here = Session(Request("cpu", target=("local",)))
    head.measure(here)
    found = {row.contender: row.figures for row in here.rows}
    assert all(row.kind == "head" and row.device == local.slug() for row in here.rows)
    assert {"time, fused", "time, unfused", "temporaries, fused", "temporaries, unfused"} <= set(found)
    assert found["time, fused"]["figure"] > 0 and found["temporaries, unfused"]["figure"] > 0
    run = results.this_run(["head"])
    results.save(here.rows, run, tmp_path)
    assert "time, unfused" in readme.head(local.slug(), tmp_path)
    assert "temporaries, fused" in tables.as_text(tables.of(here.rows))

    def crashes() -> Any:
        raise RuntimeError("of no use")

    monkeypatch.setitem(head.PARTS, cases.CPU, (crashes,))
    broken = Session(Request("cpu", target=("local",)))
    head.measure(broken)
    assert broken.failed and [row.note for row in broken.rows] == ["RuntimeError: of no use"]
    cut_down = Session(Request("cpu", only=("optax-bce",), target=("local",)))
    head.measure(cut_down)
    assert not cut_down.rows


@pytest.mark.parametrize("kind", results.TIMED)
def test_times_of_one_table_are_of_one_run(tmp_path, kind):
    """The second run lacks torch and has no row of b at all: neither may stand beside its times."""
    first = results.Run("2026-01-01", "python -m profiling report", "a machine", {"jax": "1"}, "abc")
    second = dataclasses.replace(first, date="2026-01-02")
    ours, b, torch = (dataclasses.replace(row_of(name, seconds=1.0), kind=kind) for name in ("ours", "b", "torch"))
    elsewhere = dataclasses.replace(ours, mode=cases.FORWARD)
    absent = dataclasses.replace(torch, figures={}, status=results.MISSING, note="no torch")
    results.save([ours, b, torch, elsewhere], first, tmp_path)
    (path,) = results.save([ours, absent], second, tmp_path)
    document = results.load(path)
    assert [(row.contender, row.run) for row in document.rows_of(SMALL, cases.GRADIENT).values()] == [
        ("ours", second.key)
    ]
    assert [row.note for row in document.rows if row.status == results.MISSING] == ["no torch"]
    assert [row.run for row in document.rows_of(SMALL, cases.FORWARD).values()] == [first.key]
    # A run that measured nothing has nothing to compare, and takes nothing away.
    results.save([absent], dataclasses.replace(first, date="2026-01-03"), tmp_path)
    assert set(results.load(path).rows_of(SMALL, cases.GRADIENT)) == {"ours"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 0}', '{"schema": 1, "runs": {}, "rows": [{"kind": "memory"}]}']
)
def test_a_file_that_is_no_results_file_is_named(tmp_path, text):
    path = tmp_path / "memory.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"memory\.json is no results file"):
        results.load(path)


def test_the_committed_results_are_whole():
    paths = sorted(results.FOLDER.glob("*/*.json"))
    assert paths
    for path in paths:
        document = results.load(path)
        assert document.rows and {row.device for row in document.rows} == {path.parent.name}
        assert all(run.versions["jax"] and run.machine for run in document.runs.values())
        timed = [row for row in document.rows if row.measured and row.kind in results.TIMED]
        assert all(len({row.run for row in timed if row.table == table}) == 1 for table in {row.table for row in timed})


def interrupted() -> Any:
    raise KeyboardInterrupt


def test_a_run_that_is_cut_short_keeps_what_it_has(add_contender, monkeypatch, tmp_path, capsys):
    (tmp_path / "README.md").write_text("no tables\n")
    monkeypatch.setattr(memory, "peak", lambda *_: {})
    add_contender("interrupts", interrupted)
    arguments = ["memory", "--json", *ONCE, "--only", "ours-xla,interrupts"]
    assert __main__.main(arguments) == 130
    assert [row["contender"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["ours-xla"] * 2

    request = Request("cpu", quick=True, only=("optax-bce", "interrupts"), case=(SMALL,), target=("local",))
    short = Session(request)
    run = results.this_run(["report"])
    monkeypatch.setattr(report, "PARTS", {"memory": memory.measure, "speed": speed.measure})
    report.measure(short, run, tmp_path)
    assert short.cut_short
    document = results.load(tmp_path / local.slug() / "memory.json")
    assert set(document.rows_of(SMALL, cases.GRADIENT)) == {"optax-bce"}


def test_turns_that_are_cut_short_give_the_rounds_so_far(monkeypatch):
    (case,) = cases.select([SMALL])
    short = Session(Request("cpu", only=("optax-bce",), case=(SMALL,), target=("local",)))
    timings = itertools.count()
    time = speed.Runner.time

    def interrupt_in_the_fifth_round(self: speed.Runner) -> None:
        if next(timings) == 3 * 4 + 1:
            raise KeyboardInterrupt
        time(self)

    monkeypatch.setattr(speed.Runner, "time", interrupt_in_the_fifth_round)
    rows = {row.contender: row for row in speed.in_turns(short, case, cases.GRADIENT, rounds=9)}
    assert short.cut_short
    assert set(rows) == {"ours-xla", "optax-bce"}  # ours is there for the ratio
    assert all(row.figures["rounds"] == 4 and row.figures["seconds"] > 0 for row in rows.values())
    assert rows["ours-xla"].figures["ratio_to_ours"] == 1


def test_in_place_each_call_gets_logits_of_its_own_before_the_clock_starts_and_gives_them_up(monkeypatch):
    (case,) = cases.select([SMALL])
    arrays = case.arrays()
    runner = speed.prepare(contenders.find("ours-xla"), case, cases.IN_PLACE, arrays, "cpu")
    given: list[Any] = []
    make = runner.given_up
    assert make is not None

    def remembered() -> Any:
        given.append(make())
        return given[-1]

    call, gradients = runner.call, []

    def watched(logits: Any) -> Any:
        found = call(logits)
        gradients.append(weakref.ref(found[1]))
        return found

    runner.given_up, runner.call, runner.calls = remembered, watched, 3
    clock = iter([10.0, 16.0])

    def now() -> float:
        # Before the start all are there, and at the end all are gone but none is missing, nor the last gradient.
        assert len(given) == 4
        assert len(gradients) == 1 or gradients[-1]() is not None
        return next(clock)

    monkeypatch.setattr(speed.time, "perf_counter", now)
    runner.time()
    assert runner.seconds == [2.0] and all(logits.is_deleted() for logits in given)
    value, gradient = runner.call(make())
    expected = jax.jit(jax.value_and_grad(contenders.find("ours-xla").build()))(*arrays)
    assert value == expected[0] and bool((gradient == expected[1]).all())


def test_in_flight_the_clock_stops_once_when_the_last_call_has_ended(monkeypatch):
    happened: list[str] = []
    runner = speed.Runner(
        "any", lambda: happened.append("call"), None, finish=lambda _: happened.append("end"), calls=3
    )
    clock = iter([10.0, 16.0])

    def now() -> float:
        happened.append("clock")
        return next(clock)

    with monkeypatch.context() as patched:
        patched.setattr(speed.time, "perf_counter", now)
        runner.time()
    assert happened == ["call", "end", "clock", "call", "call", "call", "end", "clock"]
    assert runner.seconds == [2.0]
    arrays = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int8)
    waits, flies = (speed.prepare_copy(arrays, cases.GRADIENT, place) for place in ("cpu", "gpu"))
    assert waits.finish is None and flies.finish is not None
    np.testing.assert_array_equal(flies.finish(flies.call()), arrays[0] + 1)


def test_a_chip_s_own_time_is_that_of_its_kernels_and_programs_and_nothing_else():
    def plane(name: str, **lines: list[float]) -> Any:
        found = [
            SimpleNamespace(name=name.replace("_", " "), events=[SimpleNamespace(duration_ns=n) for n in durations])
            for name, durations in lines.items()
        ]
        return SimpleNamespace(name=name, lines=found)

    gpu = plane("/device:GPU:0", Stream_13=[100.0, 20.0], Stream_14=[3.0], Steps=[1e6])
    tpu = plane("/device:TPU:0", XLA_Modules=[5.0], XLA_Ops=[4.0], Steps=[1e6])
    host = plane("/host:CPU", Stream_1=[1e6])
    assert on_chip.busy(SimpleNamespace(planes=[gpu, tpu, host])) == pytest.approx(128e-9)
    turns: list[int] = []
    assert on_chip.seconds(turns.append) is None  # a real trace, of a CPU
    assert turns == [on_chip.WARM_UP, on_chip.STEPS]


def test_a_chip_s_rows_have_its_own_time_and_its_share_of_the_copy_s_rate():
    (case,) = cases.select([SMALL])
    ours, copy = (speed.Runner(name, lambda: None, None, seconds=[2.0, 2.0], on_chip=1.0) for name in ("ours", "copy"))
    figures = speed.summarise(ours, ours.seconds, copy, case, cases.GRADIENT)
    copied = 2 * case.elements * 4
    assert figures["seconds_on_chip"] == 1.0 and figures["copy_bytes_per_second_on_chip"] == copied
    assert figures["fraction_of_floor_on_chip"] == figures["fraction_of_floor"] == case.floor / copied
    row = Row("speed", "any", case.name, "ours-triton", cases.GRADIENT, figures)
    assert "on the chip, ms" in tables.as_text(tables.of([row]))
    ours.on_chip = None
    assert "seconds_on_chip" not in speed.summarise(ours, ours.seconds, copy, case, cases.GRADIENT)


def test_in_place_is_measured_on_the_cpu_beside_fresh_gradients():
    short = Session(Request("cpu", only=("optax-bce",), case=(SMALL,), target=("local",)))
    speed.measure(short)
    modes = {mode: {row.contender for row in short.rows if row.mode == mode} for mode in (*cases.MODES, cases.IN_PLACE)}
    assert set(map(frozenset, modes.values())) == {frozenset({"ours-xla", "optax-bce"})}
    assert all(row.measured and row.figures["seconds"] > 0 for row in short.rows)


def test_the_official_code_is_asked_for_by_its_repository(monkeypatch, tmp_path):
    monkeypatch.delenv(torch_peers.OFFICIAL, raising=False)
    assert torch_peers.REPOSITORY in str(torch_peers.lacks_official())
    monkeypatch.setenv(torch_peers.OFFICIAL, str(tmp_path))
    assert str(tmp_path) in str(torch_peers.lacks_official())


def test_the_interval_of_a_ratio_holds_its_median_and_needs_enough_rounds():
    ratios = [1.0 + 0.1 * k for k in range(11)]
    low, high = speed.interval(ratios)
    assert low is not None and high is not None and ratios[0] < low < 1.5 < high < ratios[-1]
    assert speed.interval(ratios[:3]) == (None, None)


def test_growth_is_the_slope_of_log_time_over_log_size():
    points = [(size, 3e-6 * size**1.25) for size in (64, 128, 256, 512)]
    row = speed.grown("some-device", "batch", "ours-xla", points, {})
    assert row.figures["slope"] == pytest.approx(1.25)


@pytest.mark.long
def test_on_an_absent_tpu_ours_is_at_the_floor_and_its_bundles_are_counted_loop_by_loop():
    available("v5e")
    case, ours = cases.ON_CHIP, contenders.default("v5e")
    planned = memory.planned("v5e", case, ours, cases.GRADIENT)
    assert planned["temporaries"] <= 2**20
    assert case.floor <= planned["traffic"] <= 1.01 * case.floor
    figures = schedule.on_tpu("v5e", case, ours, cases.GRADIENT)
    (kernel,) = [k for k in figures["kernels"] if "asl_pallas" in k["name"]]
    assert len(kernel["bundles_by_depth"]) == 3
    (tiles,) = (loop for loop in kernel["loops"] if loop["turns"] > 1000)
    assert tiles["turns"] * 12 * 1024 == pytest.approx(case.elements, rel=0.02) and tiles["depth"] == 2
    assert figures["innermost_per_1024"] < figures["bundles_per_1024"] <= 13.2
    assert figures["limiting_unit"] and 0 < figures["limiting_share"] <= 1


@pytest.mark.long
def test_on_an_absent_h100_a_kernel_s_operands_count_as_traffic_and_its_instructions_are_counted():
    available("h100")
    case = cases.ON_CHIP
    ours, peer = contenders.default("h100"), contenders.find("closed-form")
    planned = memory.planned("h100", case, ours, cases.GRADIENT)
    assert case.floor <= planned["traffic"] <= 1.01 * case.floor
    assert memory.planned("h100", case, peer, cases.GRADIENT)["traffic"] > 2 * case.floor
    figures = schedule.on_cuda("h100", case, ours, cases.GRADIENT)
    assert figures["spilled_bytes"] == 0 and figures["widest_load"] == 16
    assert 32 * 10 < figures["instructions_per_1024"] < 32 * 400
    peers = schedule.on_cuda("h100", case, peer, cases.GRADIENT)
    assert peers["kernels"] > 1 and peers["instructions"] > 0


def test_quick_leaves_out_what_is_slow_to_compile_and_says_so():
    request = Request("cpu", quick=True, target=("v5e",), only=("official", "optax-bce"))
    rows = {(job.contender.name, job.mode): job.left_out for job in memory.jobs(request)}
    assert "--quick" in rows["official", cases.GRADIENT] and not rows["optax-bce", cases.GRADIENT]


@pytest.fixture(scope="module")
def device() -> str:
    """The folder of the device whose figures the README shows."""
    found = re.search(r"<!-- profiling: speed (\S+) -->", readme.README.read_text())
    assert found is not None
    return found.group(1)


def test_pictures_are_drawn_from_the_committed_results(tmp_path, device):
    shutil.copytree(results.FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))
    written = plots.draw(device, tmp_path)
    assert {path.name for path in written} == {"memory.png", "time_by_classes.png", "fraction_of_floor.png"}
    for path in written:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] == 1040 and pixels.std() > 0.05
        # Nothing is cut off: the outermost pixels are paper.
        assert np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).min() > 0.99
    assert plots.draw("a-device-without-results", tmp_path / "empty") == []


def test_the_readme_s_tables_are_the_committed_results(tmp_path):
    text = readme.README.read_text()
    assert readme.disagreements(text) == []
    assert readme.rewritten(text, None) == text
    changed = text.replace("ours", "theirs")
    assert readme.disagreements(changed)
    assert readme.rewritten(changed, None).count("ours") > 0
    assert readme.disagreements("nothing marked") == ["README.md has no table between markers"]


def test_the_readme_s_tables_follow_the_device_that_measured(tmp_path, device):
    shutil.copytree(results.FOLDER / device, tmp_path / "another", ignore=shutil.ignore_patterns("*.png"))
    text = readme.rewritten(readme.README.read_text(), "another", tmp_path)
    assert "<!-- profiling: speed another -->" in text and f"speed {device}" not in text


def test_an_accelerator_has_a_table_of_its_own_and_leaves_the_others_alone(tmp_path):
    before = readme.README.read_text()
    (card,) = re.findall(r"<!-- profiling: measured (\S+) -->", before)
    assert readme.has_chip(card)
    shutil.copytree(results.FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / card).rename(tmp_path / "another-card")
    expected = before.replace(f"| {card} |", "| another-card |")
    for kind in ("measured", "errors"):
        assert f"{kind} {card}" in before
        expected = expected.replace(f"{kind} {card}", f"{kind} another-card")
    assert readme.rewritten(before, "another-card", tmp_path) == expected


@pytest.fixture(autouse=True)
def _leaves_the_readme_alone() -> Iterator[None]:
    before = pathlib.Path(readme.README).read_bytes()
    yield
    assert pathlib.Path(readme.README).read_bytes() == before


def test_a_kernel_belongs_to_its_own_platform_and_torch_to_what_runs():
    names = {place: {c.name for c in contenders.at(place, contenders.CONTENDERS)} for place in ("v5e", "h100", "cpu")}
    assert "ours-mosaic_tpu" in names["v5e"] and "ours-mosaic_tpu" not in names["h100"] | names["cpu"]
    assert "ours-triton" in names["h100"] and "torch-asl" not in names["h100"] | names["v5e"]
    assert "torch-asl" in names["cpu"]
    assert session.device_of("v5e") == "v5e" and session.device_of("cpu") == local.slug()
