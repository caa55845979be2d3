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


def test_split_parts_whole_files(corpus):
    learned, held_out = corpus.split()
    names = {d.name for d in learned}, {d.name for d in held_out}
    assert not names[0] & names[1]
    assert 0.02 < len(held_out) / (len(learned) + len(held_out)) < 0.10


def test_split_depends_on_the_name_alone(corpus):
    assert corpus.Document("ast.py", "").held_out == corpus.Document("ast.py", "x = 1\n").held_out
    picked = [corpus.Document(f"{i}.py", "").held_out for i in range(4000)]
    assert 0.03 < np.mean(picked) < 0.07


def test_tables_tests_and_foreign_packages_are_left_out(corpus):
    for document in corpus.standard_library():
        assert not {"test", "tests", "site-packages", "encodings"} & set(document.name.split("/"))


def test_windows_begin_with_bos_and_predict_the_next_token(train_model):
    stream, bos = np.arange(100, 20_000), 7
    windows = train_model.Windows(stream, np.array([0, 5000]), bos, seed=1)
    inputs, targets = windows.batch(3, 256)
    assert inputs.shape == targets.shape == (train_model.TOKENS_PER_STEP // 256, 256)
    assert (inputs[:, 0] == bos).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (targets.diff(dim=1) == 1).all()


def test_a_step_always_draws_the_same_windows(train_model):
    stream = np.arange(20_000)
    first, again = (train_model.Windows(stream, np.array([1]), 0, seed=1) for _ in range(2))
    assert torch.equal(first.batch(9, 512)[0], again.batch(9, 512)[0])
    assert not torch.equal(first.batch(9, 512)[0], first.batch(10, 512)[0])


def test_schedule_warms_up_and_comes_down(train_model):
    shares = np.linspace(0.0, 1.0, 201)
    rates = np.array([train_model.learning_rate(share) for share in shares])
    top = rates.argmax()
    assert shares[top] <= 0.03
    assert (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] == pytest.approx(train_model.FINAL_LEARNING_RATE)
    lengths = [train_model.window_length(share) for share in shares]
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
