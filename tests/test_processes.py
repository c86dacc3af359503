"""The example on several processes: real ones, on this machine, over gloo; and on a mesh within one."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import sys
import time
import warnings

import jax
import numpy as np
import pytest
import rich.console
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import programs  # noqa: E402
import train_phenotypes  # noqa: E402
from tiny_problem import tiny_problem  # noqa: E402

from phenotypes import cluster, errors, interruption, launcher, settings, training  # noqa: E402
from phenotypes.layout import Layout  # noqa: E402
from phenotypes.linen_classifier import LinenTrainer  # noqa: E402
from phenotypes.nnx_classifier import NNXTrainer  # noqa: E402

TRAINERS = {"nnx": NNXTrainer, "linen": LinenTrainer}
UNFINISHED = ".orbax-checkpoint-tmp"
SIZES = ("--max-diseases", 300, "--batch-size", 32, "--loss", "bce")  # 7 steps an epoch


# A run of three steps


def train(trainer, layout=None, stop=None, epochs=1, after_a_step=lambda: None):
    """The losses of all steps, the test logits and the trainer's state, of three steps an epoch."""
    ours = tiny_problem(diseases=130, labels=32)
    plan = training.Plan(epochs, 32, 1e-2, 0, lambda focus: np.full(ours.sizes.labels, -2, np.float32))
    losses = []

    class Recording(TRAINERS[trainer]):
        def step(self, *arguments):
            step = super().step(*arguments)
            losses.append(step.loss)
            after_a_step()
            return step

    console = rich.console.Console(file=io.StringIO())
    stop = stop or interruption.Interruption()
    run = training.train(ours, plan, settings.asl(2, 1, 0.05), Recording, stop, console, layout=layout)
    return {"losses": np.array(losses, np.float32), "logits": run.logits(ours.ids[ours.split.test])}, run.trainer.state


@functools.cache
def train_on_one_device(trainer):
    return train(trainer)


def assert_equal_to_one_process(trainer, found, state):
    expected, expected_state = train_on_one_device(trainer)
    assert len(expected["losses"]) == 3
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    # AdamW divides a gradient by its size: the rounding of one that is nearly zero becomes a share of a whole step.
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(expected_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.long
@pytest.mark.parametrize(
    ("trainer", "mesh"), [("nnx", "data=4,model=2"), ("linen", "data=4,model=2"), ("nnx", "data=1,model=8")]
)
def test_a_mesh_in_one_process_equals_one_device_and_the_head_and_its_moments_are_cut_along_the_labels(trainer, mesh):
    layout = Layout.of(mesh)
    found, state = train(trainer, layout)  # without asymmetric_loss's warning that it can't run on shards
    assert_equal_to_one_process(trainer, found, state)
    model = layout.mesh.shape["model"]
    cut = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
    heads = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        head = re.search(r"\bhead\.(\w+)", name)
        assert leaf.sharding.is_equivalent_to(
            jax.NamedSharding(layout.mesh, cut[head[1]] if head else PartitionSpec()), leaf.ndim
        ), name
        if head:
            heads += 1
            assert leaf.addressable_shards[0].data.shape[-1] == 32 // model
    assert heads == 6  # kernel and bias, and their first and second moments


def test_a_process_makes_the_labels_of_its_devices_and_no_others():
    ours = tiny_problem(diseases=130, labels=32)
    asked = []

    def block(rows, columns):
        asked.append((rows.indices(32)[:2], columns.indices(32)[:2]))
        return ours.labels(chosen[rows], columns)

    chosen = ours.split.train[5:37]
    labels = Layout.of("data=2,model=4").labels(32, 32, block)
    np.testing.assert_array_equal(labels, ours.labels(chosen))
    assert sorted(asked) == [((i, i + 16), (j, j + 8)) for i in (0, 16) for j in (0, 8, 16, 24)]


CHILD = """
import sys
sys.path[:0] = {paths!r}
import test_processes
test_processes.take_part({arguments!r}, {trainer!r}, {out!r}, {epochs})
"""


def take_part(arguments, trainer, out, epochs):
    options = train_phenotypes.command_line(arguments)
    with interruption.Interruption() as wish, cluster.joined(options, wish) as stop:
        layout = Layout.of(options.mesh)
        print("joined", flush=True)
        once = iter(["trains"])
        found, state = train(trainer, layout, stop, epochs, lambda: [print(word, flush=True) for word in once])
        leaves = [multihost_utils.process_allgather(leaf, tiled=True) for leaf in jax.tree.leaves(state)]
        if options.process_id == 0:
            np.savez(out, *leaves, **found)


def script(*arguments):
    return programs.example("train_phenotypes.py", "--seeds", 1, *arguments)


def cluster_of(processes, start):
    """`start` is called for each process with its own flags."""
    address = f"127.0.0.1:{launcher._free_port()}"
    flags = ("--processes", processes, "--coordinator", address)
    return [start(*map(str, (*flags, "--process-id", index))) for index in range(processes)]


def small_cluster(processes, tmp_path, trainer="nnx", mesh=None, epochs=1):
    paths = [str(EXAMPLES), str(EXAMPLES.parent / "tests"), str(EXAMPLES.parent)]
    more = ["--output", str(tmp_path / "a.png"), *(["--mesh", mesh] if mesh else [])]

    def start(*flags):
        out = str(tmp_path / "found.npz")
        code = CHILD.format(paths=paths, arguments=[*flags, *more], trainer=trainer, out=out, epochs=epochs)
        return programs.start("-c", code)

    return cluster_of(processes, start)


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "trainer", "mesh"), [(2, "nnx", "data=2,model=2"), (4, "linen", "data=2,model=2")]
)
def test_three_steps_on_several_processes_equal_one_process(tmp_path, processes, trainer, mesh):
    started = small_cluster(processes, tmp_path, trainer, mesh)
    for process in started:
        out, errors = process.communicate()
        assert process.returncode == 0 and not errors, errors
        assert out == "joined\ntrains\n"  # Gloo's own lines are gone
    found = dict(np.load(tmp_path / "found.npz"))
    leaves = [found.pop(f"arr_{i}") for i in range(len(found) - 2)]
    assert_equal_to_one_process(trainer, found, leaves)


# Lost processes


@pytest.mark.long
def test_without_process_0_the_other_ends_within_a_minute_and_says_so(tmp_path):
    began = time.monotonic()
    first, second = small_cluster(2, tmp_path, epochs=10_000)
    assert second.stdout.readline() == "joined\n"
    joined = time.monotonic()
    assert second.stdout.readline() == "trains\n"
    first.kill()
    killed = time.monotonic()
    _, said = second.communicate()
    assert second.returncode != 0
    # A minute, on a machine where two processes need 10 seconds to import what they need and meet.
    assert time.monotonic() - killed < 60 * max(1.0, (joined - began) / 10)
    assert "process 0 has ended or can't be reached any more\n" in said


@pytest.mark.long
def test_a_missing_process_is_noticed(tmp_path):
    assert train_phenotypes.command_line([]).join_timeout < 60
    started = []
    for index in (0, 1):  # of two clusters
        address = f"127.0.0.1:{launcher._free_port()}"
        flags = ("--processes", 2, "--coordinator", address, "--process-id", index, "--join-timeout", 4)
        started.append((address, script(*SIZES, *flags, "--output", tmp_path / "a.png")))
    for address, process in started:
        out, said = process.communicate()
        assert process.returncode == 1 and not out
        sentence = f"train_phenotypes.py: the 2 processes haven't all met at {address} within --join-timeout 4 seconds"
        assert said == sentence + "\n"


# The script on this machine


def children(process):
    """Process ids, in the order of their starts."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" (", 1)
            if int(rest.rpartition(") ")[2].split()[1]) == process.pid:
                found.append(int(pid))
    return sorted(found)


@pytest.mark.long
def test_ctrl_c_in_one_process_ends_all_with_what_there_is(tmp_path):
    process = script(*SIZES, "--processes", 2, "--epochs", 5000, "--output", tmp_path / "a.png")
    programs.wait_for_line(process, " epoch 2/5000 ")
    both = children(process)
    os.kill(both[1], signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130 and not said, said
    assert "Interrupted" in out
    assert re.search(r"BCE \(0, 0, 0\), stopped at epoch [\d.]+ of 5000 +0\.\d{3}", out[out.index("Test: ") :])
    assert (tmp_path / "a.png").stat().st_size > 0
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in both)


@pytest.mark.long
def test_the_launcher_passes_ctrl_c_on(tmp_path):
    process = script(*SIZES, "--processes", 2, "--output", tmp_path / "a.png")
    programs.wait_until(process, lambda: len(children(process)) == 2 and all(map(imports_numpy, children(process))))
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130 and not said, said
    assert "Nothing has been trained yet" in out


def imports_numpy(pid):
    return "numpy" in pathlib.Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.long
def test_what_cant_be_shared_out_is_said_before_anything_is_trained(tmp_path):
    process = script(*SIZES[:2], "--mesh", "data=2", "--batch-size", 33, "--output", tmp_path / "a.png")
    out, said = process.communicate()
    assert process.returncode == 1 and "epoch" not in out
    assert said == "train_phenotypes.py: --batch-size 33 can't be shared out equally along data=2 of the mesh\n"


@pytest.mark.long
def test_a_process_with_other_flags_is_named_with_the_flag(tmp_path):
    started = cluster_of(2, lambda *own: script(*SIZES, *own, "--seed", own[-1], "--output", tmp_path / "a.png"))
    for process in started:
        _, said = process.communicate()
        assert process.returncode in (1, errors.EXIT_LOST)
        sentence = r"--seed isn't the same for process 1 as for process 0"
        assert re.fullmatch(rf"train_phenotypes.py: (process \d: )?{sentence}\n", said), said


# Checkpoints


def read(checkpoint):
    """A checkpoint's arrays, whole, and its JSON; without the devices that wrote it."""
    import orbax.checkpoint as ocp  # here, since the small cluster's processes import this file

    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = checkpointer.metadata(checkpoint / "state").item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(checkpoint / "state", restore_args=whole)
    return arrays, json.loads((checkpoint / "session" / "metadata").read_text())


def kill_while_saving(process, directory, after):
    """SIGKILL for the second of a launcher's processes while a later checkpoint than `after` is half there."""
    programs.wait_until(process, (directory / str(after)).exists)
    victim = children(process)[1]

    def stopped_while_saving():
        os.kill(victim, signal.SIGSTOP)
        if any(path.name.endswith(UNFINISHED) for path in directory.iterdir()):
            return True
        os.kill(victim, signal.SIGCONT)
        return False

    programs.wait_until(process, stopped_while_saving, look=0.007)
    os.kill(victim, signal.SIGKILL)


@pytest.mark.long
def test_killed_while_saving_and_resumed_two_processes_reach_the_weights_of_one(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    flags = [*SIZES, "--mesh", "model=2", "--epochs", 1, "--output", tmp_path / "a.png"]
    flags += ["--checkpoint-every", 2, "--checkpoint-dir"]
    process = script(*flags, killed, "--processes", 2)
    kill_while_saving(process, killed, after=2)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said == "train_phenotypes.py: process 1 was killed by SIGKILL\n"
    whole = max(int(path.name) for path in killed.iterdir() if path.name.isdecimal())
    shutil.copytree(killed / str(whole), killed / f"12{UNFINISHED}")

    outs = []
    for directory, more in ((killed, ("--resume", "--processes", 2)), (undisturbed, ())):
        process = script(*flags, directory, *more)
        programs.wait_until(process, (directory / "7").exists)
        process.terminate()  # what follows the last step is tested elsewhere
        out, said = process.communicate()
        assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and not said, said
        outs.append(out)
    assert f"Resuming from {killed}/{whole}: BCE (0, 0, 0) after {whole} of 7 steps" in outs[0]
    assert "Mesh data=1,model=2: 2 devices, 2 processes" in outs[0]
    assert "Mesh data=1,model=2: 2 devices, 1 processes" in outs[1]

    (ours, session), (theirs, their_session) = read(killed / "7"), read(undisturbed / "7")
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    kernel = "0.head.kernel.value"
    assert {f"{kernel}[0:256, 0:5636]", f"{kernel}[0:256, 5636:11272]"} < session["checksums"].keys()
    assert session["checksums"].keys() == their_session["checksums"].keys()

    compare = programs.start(EXAMPLES / "compare_sessions.py", killed, undisturbed)
    out, said = compare.communicate()
    assert compare.returncode == 0 and not said, said
    assert float(re.search(r"step +7 .* largest difference (\d\.\de[+-]\d\d)$", out, re.MULTILINE)[1]) < 1e-5

    damaged = max((killed / "7").rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(damaged, damaged.stat().st_size // 2)
    process = script(*flags, killed, "--resume", "--processes", 2)
    _, said = process.communicate()
    assert process.returncode == 1
    sentence = rf"the checkpoint {killed}/7 can't be read \(delete it to go on from 6\): .+"
    assert re.fullmatch(rf"train_phenotypes.py: (process \d: )?{sentence}\n", said), said


@pytest.mark.long
def test_a_process_that_cant_write_its_shards_ends_all_and_leaves_the_last_good_checkpoint(tmp_path):
    directory = tmp_path / "a"
    flags = [*SIZES, "--mesh", "model=2", "--output", tmp_path / "a.png"]
    flags += ["--checkpoint-every", 1, "--checkpoint-dir", directory]
    first, second = cluster_of(2, lambda *own: script(*flags, *own))
    programs.wait_until(second, (directory / "2").exists)
    _, hard = resource.prlimit(second.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(second.pid, resource.RLIMIT_FSIZE, (100_000, hard))
    said = [process.communicate()[1] for process in (first, second)]
    last = max(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    sentence = f"the checkpoint {directory}/{last + 1} can't be written ({directory}/{last} is the last good one)"
    assert said[1] == f"train_phenotypes.py: {sentence}: File too large\n"
    assert said[0] == f"train_phenotypes.py: process 1: {sentence}: File too large\n"
    assert (first.returncode, second.returncode) == (errors.EXIT_LOST, 1)
    arrays, session = read(directory / str(last))
    assert session["position"]["steps"] == last == arrays["1.step.value"]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: '0' isn't a whole number of at least 1"),
        (["--process-id", "0"], "--process-id: needs --coordinator"),
        (["--coordinator", "a:1"], "--coordinator: needs --process-id"),
        (["--coordinator", "a:1", "--process-id", "2", "--processes", "2"], "--process-id: 2 isn't less than --proc"),
        (["--coordinator", "a", "--process-id", "0"], "--coordinator: 'a' isn't HOST:PORT"),
        (["--coordinator", ":1", "--process-id", "0"], "--coordinator: ':1' isn't HOST:PORT"),
        (["--coordinator", "a:65536", "--process-id", "0"], "--coordinator: 'a:65536' isn't HOST:PORT"),
        (["--mesh", "4"], "--mesh: '4' isn't of the form data=4,model=2"),
        (["--mesh", "data=0"], "--mesh: 'data=0' isn't of the form data=4,model=2"),
        (["--mesh", "data=2,"], "--mesh: 'data=2,' isn't of the form data=4,model=2"),
        (["--mesh", "batch=2"], "--mesh: 'batch=2' has an axis 'batch'; there are data and model"),
        (["--mesh", "data=2,data=2"], "--mesh: 'data=2,data=2' has the axis data twice"),
        (["--mesh", "data=3", "--processes", "2"], "--mesh: the 3 devices of data=3,model=1 can't be shared out"),
    ],
)
def test_a_bad_flag_exits_with_2_and_says_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train_phenotypes.command_line(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_flag_is_refused_before_jax_is_imported():
    command = ["-X", "importtime", EXAMPLES / "train_phenotypes.py", "--mesh", "data=2,model=0"]
    process = programs.start(*command)
    _, said = process.communicate()
    assert process.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not imported & {"jax", "flax", "numpy", "sklearn", "orbax"}


def test_a_mesh_that_the_devices_or_the_shapes_dont_fit_is_refused():
    with pytest.raises(errors.CannotRun, match=r"--mesh: data=3,model=1 is a mesh of 3 devices; there are 8 \(1 pro"):
        Layout.of("data=3,model=1")
    with pytest.raises(errors.CannotRun, match=r"--batch-size 30 can't be shared out equally along data=4"):
        Layout.of("data=4,model=2").check(30, 32)
    with pytest.raises(errors.CannotRun, match=r"--mesh: the 1,409 labels can't be shared out equally along model=2"):
        Layout.of("data=4,model=2").check(32, 1409)


@pytest.mark.long
def test_an_address_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = script("--coordinator", address, "--process-id", 0, "--processes", 2, "--output", tmp_path / "a.png")
        _, said = process.communicate()
    assert process.returncode == 1
    assert said == f"train_phenotypes.py: --coordinator: process 0 can't listen on {address}: Address already in use\n"
