"""The example with a million labels, at small sizes: corpus, train step, memory, and the script itself."""

import pathlib
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import programs  # noqa: E402
import train_extreme  # noqa: E402

from asl_pallas import AsymmetricLoss, SparseLabels  # noqa: E402
from extreme import classifier, memory, session  # noqa: E402
from extreme.corpus import LENGTH, MOST, NO_LABEL, NOISE, PADDING, WORDS_A_LABEL, Corpus, precision_at  # noqa: E402
from phenotypes.errors import CannotRun  # noqa: E402
from phenotypes.interruption import Interruption  # noqa: E402

LABELS, VOCABULARY = 1003, 501


@pytest.fixture(scope="module")
def corpus():
    return Corpus(LABELS, VOCABULARY, seed=3)


# Corpus


def test_labels_are_as_frequent_as_the_corpus_says_and_follow_the_law(corpus):
    examples = 40_000
    drawn = corpus.draw(np.random.default_rng(0), examples).labels
    dense = np.asarray(SparseLabels(drawn, LABELS).to_dense())
    counts, expected = dense.sum(axis=0), examples * corpus.frequencies
    assert np.abs((counts - expected) / np.sqrt(expected)).max() < 5
    ranked = corpus.frequencies[corpus.by_rank]
    assert (np.diff(ranked) < 0).all()
    assert ranked[20] / ranked[60] == pytest.approx(2, rel=0.02)  # 1 / (20 + rank)
    assert ((drawn != NO_LABEL).sum(axis=1).min(), (drawn != NO_LABEL).sum(axis=1).max()) == (3, MOST)


def test_an_example_shows_words_of_its_labels_and_of_no_others(corpus):
    batch = corpus.draw(np.random.default_rng(1), 2000)
    assert batch.words.shape == (2000, LENGTH) and batch.words.dtype == np.int32
    assert batch.words.max() < VOCABULARY
    shown = batch.words[:, :-NOISE].reshape(2000, MOST, WORDS_A_LABEL)
    assert (batch.words[:, -NOISE:] != PADDING).all()
    assert (shown[batch.labels == NO_LABEL] == PADDING).all()
    present = shown[batch.labels != NO_LABEL]
    assert (present != PADDING).mean() == pytest.approx(0.8, abs=0.01)
    for label in corpus.by_rank[:3]:
        words = shown[batch.labels == label]
        assert len({word for word in words.ravel() if word != PADDING}) <= WORDS_A_LABEL


def test_a_seed_makes_the_same_corpus_again_and_another_seed_another(corpus):
    same, other = (Corpus(LABELS, VOCABULARY, seed).draw(np.random.default_rng(1), 50) for seed in (3, 4))
    batch = corpus.draw(np.random.default_rng(1), 50)
    assert (batch.words == same.words).all() and (batch.labels == same.labels).all()
    assert (batch.words != other.words).any()


def test_precision_counts_a_label_that_is_drawn_twice_once():
    ranked = np.array([[4, 2, 9], [0, 1, 2]])
    labels = np.array([[2, 4, 4, NO_LABEL], [7, 8, NO_LABEL, NO_LABEL]])
    assert precision_at(1, ranked, labels) == 1 / 2
    assert precision_at(3, ranked, labels) == 2 / 6


# Train step


def trainer(corpus, optimizer):
    model = classifier.Classifier(VOCABULARY, 16, corpus.frequencies, AsymmetricLoss(), jnp.float32, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)


@pytest.mark.long
def test_the_unfused_step_is_the_same_step(corpus):
    """Otherwise the table would compare two different things."""
    fused, unfused = trainer(corpus, optax.sgd(0.3)), trainer(corpus, optax.sgd(0.3))
    rng = np.random.default_rng(0)
    for _ in range(3):
        batch = corpus.draw(rng, 33)
        labels = SparseLabels(batch.labels, LABELS)
        words, dense = jnp.asarray(batch.words), jnp.asarray(labels.to_dense(), jnp.int8)
        loss = classifier.train_step(*fused, words, jax.tree.map(jnp.asarray, labels))
        expected = classifier.unfused_train_step(*unfused, words, dense)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    states = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))) for model, _ in (fused, unfused))
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    best = classifier.best_labels(fused[0], words, 5)
    expected = jax.lax.top_k(fused[0].head(fused[0].features(words)), 5)[1]
    assert (np.asarray(best) == np.asarray(expected)).all()


def test_the_best_labels_are_found_without_a_copy_of_the_model(corpus):
    model, _ = trainer(corpus, optax.sgd(0.3))
    words = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    analysis = classifier.best_labels.lower(model, words, 5).compile().memory_analysis()
    assert analysis.output_size_in_bytes < 2 * 8 * 5 * 4


# Memory


def test_a_million_labels_where_they_fit_and_fewer_where_not():
    sizes = (128, 2**15, 512)
    assert memory.labels_that_fit(None, *sizes) == 1_000_000
    assert memory.labels_that_fit(16 * 2**30, *sizes) == 1_000_000
    assert memory.labels_that_fit(3 * 2**30, *sizes) == 500_000
    assert memory.labels_that_fit(0, *sizes) == 10_000


def test_the_machine_says_how_much_memory_it_has_and_the_process_how_much_it_took():
    available = memory.available_bytes()
    assert available is None or 0 < available < 2**50
    assert 2**25 < memory.peak_resident_bytes() < 2**40


# Session


def options(*arguments):
    sizes = ("--labels", 12_000, "--vocabulary", 4000, "--width", 64, "--batch", 128, "--held-out", 200, "--steps", 15)
    return train_extreme.command_line([*map(str, sizes), *map(str, arguments)])


@pytest.fixture(scope="module")
def session_run():
    """One session's curve, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(sys.stdout, "write", lines.append)
        curve = session.run(options(), Interruption())
    return curve, "".join(lines)


@pytest.mark.long
def test_a_session_learns_what_it_has_not_seen(session_run):
    curve, out = session_run
    popularity = float(re.search(r"the commonest labels for everyone: P@1 (0\.\d+)", out).group(1))
    assert [point.steps for point in curve] == [0, 3, 6, 9, 12, 15]
    assert curve[0].precision_at_1 == pytest.approx(popularity, abs=5e-4)  # the bias begins at the frequencies
    assert curve[-1].precision_at_1 > 0.25 > 4 * popularity
    assert curve[-1].precision_at_1 > curve[1].precision_at_1 > curve[0].precision_at_1
    assert curve[-1].precision_at_5 > curve[1].precision_at_5 > curve[0].precision_at_5
    assert curve[-1].loss < curve[1].loss


def test_a_session_ends_with_the_memory_of_both_steps(session_run):
    _, out = session_run
    rows = {
        name: [float(cell.replace(",", "")) for cell in re.search(rf"{name} +([\d.,]+) +([\d.,]+)", out).groups()]
        for name in ("optimizer state", "labels", "among them", "as compiled")
    }
    mebibyte = 2**20
    parameters = 4 * (4000 * 64 + 64 * 65 + 12_000 * 65) / mebibyte
    assert rows["optimizer state"][0] == rows["optimizer state"][1] == pytest.approx(parameters, rel=0.05)
    assert rows["labels"] == pytest.approx([128 * 7 * 4 / mebibyte, 128 * 12_000 / mebibyte], abs=0.005)
    logits = 128 * 12_000 * 4 / mebibyte
    assert rows["among them"][1] - rows["among them"][0] > logits / 2
    for column in (0, 1):
        parts = sum(rows[name][column] for name in ("optimizer state", "labels", "among them"))
        assert rows["as compiled"][column] == pytest.approx(parts, abs=0.02)
    assert memory.needed_bytes(12_000, 64, 4000, 200) > rows["as compiled"][0] * mebibyte


@pytest.mark.long
def test_a_seed_makes_the_same_session_again(session_run):
    first = session.run(options("--steps", 3, "--evaluate-every", 3), Interruption())
    assert first == [session_run[0][0], session_run[0][1]]


def test_a_loss_that_is_not_finite_ends_the_session_and_names_the_learning_rate():
    with pytest.raises(CannotRun, match=r"the loss is .* steps: try a smaller --learning-rate than 1e\+30"):
        session.run(options("--learning-rate", 1e30), Interruption())


def test_labels_beyond_the_memory_are_refused_before_anything_is_made():
    with pytest.raises(CannotRun, match=r"--labels 2000000000 at --width 64.* GiB, and .* GiB are free"):
        session.run(options("--labels", 2_000_000_000), Interruption())


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "4"], "--labels: '4' isn't a whole number of at least 5"),
        (["--labels", "1e6"], "--labels: '1e6' isn't a whole number"),
        (["--steps", "0"], "--steps: '0' isn't a whole number of at least 1"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' isn't a number of at least 0"),
        (["--clip", "1"], "--clip: '1' isn't a number of at least 0 and less than 1"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
    ],
)
def test_a_bad_flag_exits_with_2_and_says_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train_extreme.command_line(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_ctrl_c_while_training_ends_with_what_there_is():
    arguments = ["--labels", 3000, "--vocabulary", 1000, "--width", 16, "--batch", 32, "--held-out", 64]
    arguments += ["--dtype", "bfloat16", "--steps", 1_000_000, "--evaluate-every", 5]
    process = programs.example("train_extreme.py", *arguments)
    programs.wait_for_line(process, "step 5/")
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130, errors
    assert not errors
    assert "Interrupted" in out
    assert re.search(r"after 5 steps +0\.\d{3} +0\.\d{3}", out)
    assert "Memory of a train step, 32 examples x 3,000 labels" in out
