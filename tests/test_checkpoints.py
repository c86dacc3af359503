"""The example's checkpoints: killed, damaged, of other settings, on a full disk; and what is resumed, bit for bit."""

import contextlib
import io
import itertools
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rich.console

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import programs  # noqa: E402
import train_phenotypes  # noqa: E402
from tiny_problem import tiny_problem  # noqa: E402

from phenotypes import checkpoints, interruption, settings, training  # noqa: E402
from phenotypes.linen_classifier import LinenTrainer  # noqa: E402
from phenotypes.nnx_classifier import NNXTrainer  # noqa: E402

STEPS = 10  # of a run in the tests that train nothing
UNFINISHED = ".orbax-checkpoint-tmp"


class Arrays:
    """In a trainer's place: arrays of one number, too large to be stored inline; they make a few files of a few KB."""

    def __init__(self, number, columns=1000):
        rng = np.random.default_rng(number)
        self.state = {
            "kernel": jax.numpy.asarray(rng.random((7, columns), np.float32)),
            "count": jax.numpy.int32(number),
        }


def options(directory, *arguments):
    return train_phenotypes.command_line(["--checkpoint-dir", str(directory), *map(str, arguments)])


def store(directory, *arguments, out=None, steps_per_run=STEPS):
    console = rich.console.Console(file=out or io.StringIO(), highlight=False)
    return checkpoints.Store(options(directory, *arguments), "2001-02-03", steps_per_run, console)


def position(steps):
    return training.Position(steps, np.random.default_rng(steps).bit_generator.state, [0.1 * steps, 1 / 3])


@pytest.fixture(autouse=True)
def pictures_go_elsewhere(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(train_phenotypes, "HERE", tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd):
    """Neither a traceback of Orbax's threads nor a warning."""
    yield
    assert capfd.readouterr().err == ""


# What comes back


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    first = store(tmp_path)
    keeper = first.keeper("BCE")
    point = training.Point(1.0, 1 / 3, 1e-300, 0.7)
    saved = training.Position(3, np.random.default_rng(5).bit_generator.state, [float(np.float32(0.1))], [point], 2.5)
    trainer = Arrays(1)
    assert keeper.restore(trainer) is None
    keeper.save(trainer, saved)

    out = io.StringIO()
    restored = Arrays(2)
    assert store(tmp_path, "--resume", out=out).keeper("BCE").restore(restored) == saved
    for name in ("kernel", "count"):
        np.testing.assert_array_equal(restored.state[name], trainer.state[name])
    assert re.search(rf"Resuming from {re.escape(str(tmp_path))}/3: BCE after 3 of {STEPS} steps", out.getvalue())


def test_kept_are_the_newest_two_and_every_finished_run(tmp_path):
    saving = store(tmp_path)
    for number in (1, 2):
        keeper = saving.keeper(f"run {number}")
        for steps in (5, STEPS):
            keeper.save(Arrays(10 * number + steps), position(steps))
    keeper = saving.keeper("run 3")
    for steps in (2, 4, 6):
        keeper.save(Arrays(30 + steps), position(steps))
    assert saving.steps() == [STEPS, 2 * STEPS, 24, 26]

    resumed = store(tmp_path, "--resume")
    for number, steps, seed in ((1, STEPS, 20), (2, STEPS, 30), (3, 6, 36)):
        trainer = Arrays(0)
        assert resumed.keeper(f"run {number}").restore(trainer) == position(steps)
        np.testing.assert_array_equal(trainer.state["kernel"], Arrays(seed).state["kernel"])
    assert resumed.keeper("run 4").restore(Arrays(0)) is None

    shutil.rmtree(tmp_path / str(STEPS))
    with pytest.raises(checkpoints.CheckpointError, match=rf"/{STEPS}, the last checkpoint of run 1, is missing"):
        store(tmp_path, "--resume").keeper("run 1").restore(Arrays(0))


@pytest.mark.long
@pytest.mark.parametrize("make_trainer", [NNXTrainer, LinenTrainer])
def test_ctrl_c_saves_the_step_and_the_rest_is_bit_for_bit_an_undisturbed_run(tmp_path, make_trainer):
    problem = tiny_problem(diseases=200, labels=30)
    plan = training.Plan(3, 32, 1e-2, 0, lambda focus: np.full(problem.sizes.labels, -5, np.float32))
    total = 3 * (len(problem.split.train) // 32)
    console = rich.console.Console(file=io.StringIO())

    def train(directory=None, *flags, stop_after=None):
        wish = interruption.Interruption()
        keeper = None
        if directory is not None:
            keeper = checkpoints.Store(options(directory, *flags), "2001-02-03", total, console).keeper("BCE")

        class Stopping(make_trainer):
            def step(self, *arguments):
                wish.requested = next(taken) == stop_after
                return super().step(*arguments)

        taken = itertools.count(1)
        return training.train(problem, plan, settings.bce(), Stopping, wish, console, keeper)

    undisturbed = train()
    stops = (2, total // 3, None)  # within an epoch, then in the next one, then at the end
    for number, stop in enumerate(stops):
        run = train(tmp_path / "a", *["--resume"] * (number > 0), stop_after=stop)
        assert run.complete == (stop is None)
    assert run.curve == undisturbed.curve
    for ours, theirs in zip(*(jax.tree.leaves(r.trainer.state) for r in (run, undisturbed)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# What is never loaded


def test_an_unfinished_checkpoint_is_not_loaded_and_is_cleared_away(tmp_path):
    keeper = store(tmp_path).keeper("BCE")
    keeper.save(Arrays(0), position(2))
    keeper.save(Arrays(1), position(3))
    shutil.rmtree(tmp_path / "2" / "session")  # killed while the old one was being deleted
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    shutil.copytree(tmp_path / "3", tmp_path / f"7{UNFINISHED}")
    cut = tmp_path / f"8{UNFINISHED}"
    shutil.copytree(tmp_path / "3", cut)
    shutil.rmtree(cut / "session")
    keeper = store(tmp_path, "--resume").keeper("BCE")
    assert keeper.restore(Arrays(2)) == position(3)
    keeper.save(Arrays(7), position(7))  # under the name that an unfinished one had
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "7"]
    restored = Arrays(0)
    assert store(tmp_path, "--resume").keeper("BCE").restore(restored) == position(7)
    np.testing.assert_array_equal(restored.state["kernel"], Arrays(7).state["kernel"])


CHILD = """
import sys
sys.path[:0] = {paths!r}
import test_checkpoints as tests
saving = tests.store(*{arguments!r}, steps_per_run=10_000)
keeper = saving.keeper("BCE")
for steps in range(1 + max(saving.steps(), default=0), 10_000):
    keeper.save(tests.Arrays(steps, columns=300_000), tests.position(steps))
    print(steps, flush=True)
"""


@pytest.mark.long
def test_killed_at_random_moments_of_a_save_the_last_announced_checkpoint_or_a_later_one_is_whole(tmp_path):
    moments = random.Random(0)
    arguments = [str(tmp_path / "a"), "--resume", "--output", str(tmp_path / "a.png")]
    paths = [str(EXAMPLES), str(EXAMPLES.parent / "tests"), str(EXAMPLES.parent)]
    for kill in range(3):
        code = CHILD.format(paths=paths, arguments=arguments)
        child = programs.start("-c", code)
        announced = int(child.stdout.readline())
        while True:  # a moment within a write, not between two
            time.sleep(moments.uniform(0, 0.05))
            child.send_signal(signal.SIGSTOP)
            if any(path.name.endswith(UNFINISHED) for path in (tmp_path / "a").iterdir()):
                break
            child.send_signal(signal.SIGCONT)
        child.kill()
        announced = max([announced, *map(int, child.communicate()[0].split())])

        trainer = Arrays(0, columns=300_000)
        found = store(*arguments, steps_per_run=10_000).keeper("BCE").restore(trainer)
        assert found.steps >= announced, f"kill {kill}"
        assert found == position(found.steps)
        np.testing.assert_array_equal(trainer.state["kernel"], Arrays(found.steps, columns=300_000).state["kernel"])


# What is refused


def damaged(path):
    """Bytes in the file's place: one changed, cut in half; None: gone."""
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9) if len(whole) > 5000 else (0.5,):
        place = int(len(whole) * share)
        yield whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    yield whole[: len(whole) // 2]
    yield None


@pytest.mark.long
def test_a_damaged_checkpoint_is_refused_by_name_or_loaded_right_but_never_wrong(tmp_path):
    first = store(tmp_path).keeper("BCE")
    first.save(Arrays(1), position(3))
    first.save(Arrays(2), position(4))
    refused = set()
    for path in sorted((tmp_path / "4").rglob("*")):
        whole = path.read_bytes() if path.is_file() else None
        for bytes_now in damaged(path) if whole else ():
            path.unlink()
            if bytes_now is not None:
                path.write_bytes(bytes_now)
            trainer = Arrays(0)
            try:
                assert store(tmp_path, "--resume").keeper("BCE").restore(trainer) == position(4)
                np.testing.assert_array_equal(trainer.state["kernel"], Arrays(2).state["kernel"])
                assert trainer.state["count"] == 2
            except checkpoints.CheckpointError as error:
                refused.add(path.parent.name)
                message = str(error)
                assert message.startswith(f"the checkpoint {tmp_path}/4 can't be read (delete it to go on from 3): ")
                assert "\n" not in message and len(message) < 400
                np.testing.assert_array_equal(trainer.state["kernel"], Arrays(0).state["kernel"])
            path.write_bytes(whole)
    assert {"session", "state", "d"} <= refused  # the JSON, the tree, the arrays' data

    shutil.rmtree(tmp_path / "4")  # the advice
    assert store(tmp_path, "--resume").keeper("BCE").restore(Arrays(0)) == position(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "asl"], '--loss is "asl" and .* were made with "all"'),
        (["--batch-size", 32], "--batch-size is 32 and .* were made with 256"),
        (["--seed", 1], "--seed is 1 and .* were made with 0"),
        (["--epochs", 11], "--epochs is 11 and .* were made with 8"),
        (["--gamma-neg", 2], "--gamma-neg is 2.0 and .* were made with null"),
        (["--linen"], "--linen is true and .* were made with false"),
        (["--mesh", "model=2"], '--mesh is "data=1,model=2" and .* were made with null'),
    ],
)
def test_resuming_with_other_settings_names_the_setting(tmp_path, arguments, message):
    store(tmp_path).keeper("BCE").save(Arrays(1), position(3))
    with pytest.raises(checkpoints.CheckpointError, match=f"--resume: {message}"):
        store(tmp_path, "--resume", *arguments)
    for may_change in (["--checkpoint-every", 5], ["--output", tmp_path / "b.png"], ["--processes", 2]):
        store(tmp_path, "--resume", *may_change)


def test_another_release_of_the_data_is_refused(tmp_path):
    store(tmp_path).keeper("BCE").save(Arrays(1), position(3))
    with pytest.raises(checkpoints.CheckpointError, match=r'release is "2002-01-01" and .* "2001-02-03"'):
        checkpoints.Store(options(tmp_path, "--resume"), "2002-01-01", STEPS, rich.console.Console(file=io.StringIO()))


def test_a_new_session_doesnt_mix_with_an_old_one(tmp_path):
    store(tmp_path).keeper("BCE").save(Arrays(1), position(3))
    with pytest.raises(checkpoints.CheckpointError, match=r"holds a session's checkpoints: --resume continues it"):
        store(tmp_path)


def test_without_a_checkpoint_resume_starts_from_the_beginning_and_says_so(tmp_path):
    out = io.StringIO()
    assert store(tmp_path / "new", "--resume", out=out).keeper("BCE").restore(Arrays(0)) is None
    assert out.getvalue() == f"No checkpoint in {tmp_path}/new yet: starting from the beginning\n"


def test_a_directory_that_cant_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoints.CheckpointError, match=r"--checkpoint-dir: .*/file can't be made: File exists"):
        store(tmp_path / "file")


@pytest.mark.parametrize("flags", [["--resume"], ["--checkpoint-every", "3"]])
def test_flags_that_need_a_directory_say_so(capfd, flags):
    with pytest.raises(SystemExit) as exit:
        train_phenotypes.command_line(flags)
    assert exit.value.code == 2
    assert f"{flags[0]}: needs --checkpoint-dir" in capfd.readouterr().err


# A full disk


@contextlib.contextmanager
def full_disk(folder, megabytes=1):
    """A small disk, for root only."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mount needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def short_files(folder):
    """No file longer than 600 KB, for anyone: the system refuses the write within TensorStore as a full disk's does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("disk", "reason"), [(full_disk, "No space left on device"), (short_files, "File too large")], ids=["full", "short"]
)
def test_a_checkpoint_that_cant_be_written_leaves_the_last_good_one(tmp_path, disk, reason):
    folder = tmp_path / "disk"
    with disk(folder):
        keeper = store(folder).keeper("BCE")
        keeper.save(Arrays(1, 15_000), position(1))  # 420 KB
        with pytest.raises(checkpoints.CheckpointError) as error:
            keeper.save(Arrays(2, 30_000), position(2))
        last = f"({folder}/1 is the last good one)"
        assert str(error.value) == f"the checkpoint {folder}/2 can't be written {last}: {reason}"
        trainer = Arrays(0, 15_000)
        assert store(folder, "--resume").keeper("BCE").restore(trainer) == position(1)
        np.testing.assert_array_equal(trainer.state["kernel"], Arrays(1, 15_000).state["kernel"])


# The script


def start(directory, *arguments):
    sizes = ["--max-diseases", 300, "--batch-size", 32, "--gamma-neg", 2]  # 7 steps an epoch
    files = ["--checkpoint-dir", directory, "--output", directory.parent / "a.png"]
    return programs.example("train_phenotypes.py", "--seeds", 1, *sizes, *files, *arguments)


def kill_after(process, checkpoint):
    """Its output until then; nothing on stderr."""
    programs.wait_until(process, checkpoint.exists)
    process.kill()
    out, errors = process.communicate()
    assert not errors
    return out


def assert_equal_weights(checkpoint, other):
    with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        ours, theirs = (checkpointer.restore(path / "state") for path in (checkpoint, other))
    assert ours.keys() == theirs.keys() and len(ours) > 15  # parameters, AdamW's two moments, counts
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.long
def test_killed_in_its_second_run_and_resumed_the_script_ends_as_an_undisturbed_one(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    flags = ["--epochs", 1, "--resume", "--checkpoint-every", 3]
    out = kill_after(start(killed, *flags), killed / "10")  # 7 steps of BCE, 3 with the focal loss
    assert f"No checkpoint in {killed} yet: starting from the beginning" in out
    shutil.copytree(killed / "10", killed / f"1000{UNFINISHED}")
    tables = []
    for directory in (killed, undisturbed):
        process = start(directory, *flags)
        out, errors = process.communicate()
        assert process.returncode == 0 and not errors, errors
        assert ("Resuming from" in out) == (directory is killed)
        tables.append(re.search(r"Test: .*(?=\n\d+ s, )", out, re.DOTALL)[0])
    assert_equal_weights(killed / "21", undisturbed / "21")
    assert tables[0] == tables[1]  # with the finished runs' figures


@pytest.mark.long
def test_linen_killed_and_resumed_has_the_weights_of_an_undisturbed_run_and_a_cut_file_is_named(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    flags = ["--linen", "--loss", "asl", "--epochs", 2, "--checkpoint-every", 3]
    kill_after(start(killed, *flags), killed / "9")  # in the second epoch
    assert "Resuming from" in kill_after(start(killed, *flags, "--resume"), killed / "14")
    kill_after(start(undisturbed, *flags), undisturbed / "14")
    assert_equal_weights(killed / "14", undisturbed / "14")

    largest = max((killed / "14").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    process = start(killed, *flags, "--resume")
    _, errors = process.communicate()
    assert process.returncode == 1
    sentence = rf"the checkpoint {killed}/14 can't be read \(delete it to go on from 12\): .+"
    assert re.fullmatch(rf"train_phenotypes.py: {sentence}\n", errors)


@pytest.mark.long
def test_a_full_disk_ends_the_script_with_one_sentence(tmp_path):
    with full_disk(tmp_path / "disk", megabytes=30) as disk:
        process = start(disk, "--checkpoint-every", 1)
        _, errors = process.communicate()
        assert process.returncode == 1
        last = max(int(path.name) for path in disk.iterdir() if path.name.isdecimal())
        sentence = rf"the checkpoint {disk}/{last + 1} can't be written \({disk}/{last} is the last good one\)"
        assert re.fullmatch(rf"train_phenotypes.py: {sentence}: No space left on device\n", errors), errors
