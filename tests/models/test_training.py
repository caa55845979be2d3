"""The parts of ``scripts/train_model.py``: the data, the schedule and the loss."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(scope="module")
def corpus(scripts_on_path):
    return importlib.import_module("corpus")


@pytest.fixture(scope="module")
def train_model(scripts_on_path):
    return importlib.import_module("train_model")


def test_every_file_is_in_one_part(corpus):
    parts = [corpus.select(held_out=held_out, tests=tests) for held_out in (False, True) for tests in (False, True)]
    assert all(parts)
    assert sorted(sum(parts, [])) == sorted(d.text for d in corpus.standard_library())
    assert 0.02 < len(parts[2]) / (len(parts[0]) + len(parts[2])) < 0.10


def test_tests_are_told_from_the_library(corpus):
    assert corpus.Document("ctypes/test/test_cast.py", "").is_test
    assert not corpus.Document("unittest/case.py", "").is_test


def test_split_depends_on_the_name_alone(corpus):
    assert corpus.Document("ast.py", "").held_out == corpus.Document("ast.py", "x = 1\n").held_out
    picked = [corpus.Document(f"{i}.py", "").held_out for i in range(4000)]
    assert 0.03 < np.mean(picked) < 0.07


def test_tables_and_foreign_packages_are_left_out(corpus):
    for document in corpus.standard_library():
        assert not {"site-packages", "encodings", "pydoc_data"} & set(document.name.split("/"))


@pytest.fixture
def windows(train_model):
    """The library holds numbers below 100,000, its tests those above; four files in each."""
    rows = [list(range(start, start + 9_000)) for start in range(1_000, 41_000, 10_000)]
    library = train_model.Stream(rows, eos=1, seed=0)
    tests = train_model.Stream([[100_000 + token for token in row] for row in rows], eos=1, seed=0)
    return train_model.Windows(library, tests, bos=0, seed=5)


def test_a_stream_holds_every_file_behind_its_bos(train_model):
    stream = train_model.Stream([[0, 5, 6], [0, 7], [0, 8, 9, 10]], eos=1, seed=0)
    files = {tuple(file) for file in np.split(stream.tokens, np.flatnonzero(stream.tokens == 0))[1:]}
    assert files == {(0, 5, 6, 1), (0, 7, 1), (0, 8, 9, 10, 1)}
    assert set(stream.tokens[stream.starts]) == {5, 7, 8}


@pytest.mark.parametrize(("share", "length"), [(0.0, 256), (0.6, 512), (0.99, 2048)])
def test_windows_begin_with_bos_and_predict_the_next_token(train_model, windows, share, length):
    inputs, targets = windows.batch(3, share)
    assert inputs.shape == targets.shape == (train_model.TOKENS_PER_STEP // length, length)
    assert (inputs[:, 0] == 0).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    inside = targets[:, 1:][(targets[:, 1:] > 1) & (targets[:, :-1] > 1)]
    before = targets[:, :-1][(targets[:, 1:] > 1) & (targets[:, :-1] > 1)]
    assert ((inside - before == 1) | (inside % 10_000 == 1_000)).all()


def test_tests_come_in_late(windows):
    early = torch.cat([windows.batch(step, 0.1)[1].flatten() for step in range(20)])
    late = torch.cat([windows.batch(step, 0.6)[1].flatten() for step in range(20)])
    assert not (early >= 100_000).any()
    assert 0.3 < (late >= 100_000).float().mean() < 0.7


def test_some_windows_open_at_the_first_token_of_a_file(windows):
    opens = torch.cat([windows.batch(step, 0.1)[1][:, 0] for step in range(40)])
    assert 0.08 < torch.isin(opens % 10_000, torch.tensor([1_001])).float().mean() < 0.25


def test_a_step_always_draws_the_same_windows(windows):
    assert torch.equal(windows.batch(9, 0.6)[0], windows.batch(9, 0.6)[0])
    assert not torch.equal(windows.batch(9, 0.6)[0], windows.batch(10, 0.6)[0])


def test_schedule_warms_up_and_comes_down(train_model):
    shares = np.linspace(0.0, 1.0, 201)
    rates = np.array([train_model.learning_rate(share) for share in shares])
    top = rates.argmax()
    assert shares[top] <= 0.03
    assert (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] == pytest.approx(train_model.FINAL_LEARNING_RATE)
    lengths = [train_model.at(share, train_model.WINDOW_LENGTHS) for share in shares]
    assert lengths == sorted(lengths)
    assert all(train_model.TOKENS_PER_STEP % length == 0 for length in lengths)


def test_budget_counts_steps_or_time(train_model):
    assert train_model.Budget(minutes=2.0, steps=None).share(step=999, seconds=30.0) == 0.25
    assert train_model.Budget(minutes=2.0, steps=10).share(step=5, seconds=1e9) == 0.5
    assert train_model.Budget(minutes=2.0, steps=None).share(step=0, seconds=1e9) == 1.0


@pytest.mark.parametrize("rows", [1, 1000, 1024, 2500])
def test_loss_and_gradients_equal_cross_entropy(scripts_on_path, rows):
    next_token_loss = importlib.import_module("token_loss").next_token_loss
    generator = torch.Generator().manual_seed(0)
    # Values that bfloat16 holds exactly, so that only the rounding of products remains.
    hidden = torch.randn(rows, 32, generator=generator).bfloat16().float()
    weight = torch.randn(61, 32, generator=generator).bfloat16().float()
    targets = torch.randint(0, 61, (rows,), generator=generator)

    def gradients(loss_of):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(*leaves)
        (3.0 * loss).backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    ours = gradients(lambda h, w: next_token_loss(h, w, targets))
    exact = gradients(lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, targets))
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-2)
    for mine, other in zip(ours[1:], exact[1:], strict=True):
        assert torch.linalg.vector_norm(mine - other) < 2e-2 * torch.linalg.vector_norm(other)
