"""``pagedkv serve --replicas``: what is refused before anything is started, and what a replica is made of."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pagedkv.cli import serve_replicas
from pagedkv.cli.app import app
from pagedkv.cli.engine_options import EngineOptions, TierOptions
from pagedkv.cli.model_source import find_model
from pagedkv.cli.serve_replicas import EngineRecipe, FleetOptions
from pagedkv.cli.terminal import Failure
from pagedkv.server import ServerConfig

pytest.importorskip("fastapi")


def failure(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--replicas", "0"], "--replicas: expected 1 … 4096, got 0"),
        (["--threads", "0", "--replicas", "2"], "--threads: expected 1 … 1024, got 0"),
        (["--threads", "2"], "--threads: expected --replicas beside it"),
        (["--routing", "nearest"], "--routing: expected module:Class or one of round_robin"),
        (["--autoscale", "4:1"], "--autoscale: expected two numbers such as 1:4"),
        (["--autoscale", '{"min_replicas": 1}'], '"max_replicas"'),
        (["--replicas", "2", "--show-tokens"], "--show-tokens: expected one engine"),
        (["--autoscale", "1:2", "--record-events", "e"], "--record-events: expected one engine"),
        (["--ray-address", "auto", "--events-endpoint", "tcp://*:1"], "--events-endpoint: expected one engine"),
        (["--replicas", "2", "--device", "cuda:1"], "--device: expected cuda, of which each replica gets one"),
        (["--replicas", "2", "--host-memory", "8GiB"], "--host-memory: expected a pool on a device"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], text: str) -> None:
    assert text in failure(*arguments)


@pytest.mark.parametrize(("module", "extra"), [("ray", "ray"), ("aiohttp", "ray"), ("zmq", "events")])
def test_what_is_missing_is_named_with_what_brings_it(monkeypatch: Any, module: str, extra: str) -> None:
    monkeypatch.setattr(serve_replicas, "find_spec", lambda name: None if name == module else name)
    assert f"pip install 'pagedkv[{extra}]'" in failure("--replicas", "2", "--port", "0")


def test_a_fleet_is_asked_for() -> None:
    assert not FleetOptions().is_fleet and FleetOptions(replicas=2).is_fleet
    assert FleetOptions(ray_address="auto").is_fleet
    assert FleetOptions(autoscale="2:5").autoscaling == {"min_replicas": 2, "max_replicas": 5}
    whole = {"max_replicas": 3, "target_ongoing_requests": 8}
    assert FleetOptions(autoscale='{"max_replicas": 3, "target_ongoing_requests": 8}').autoscaling == whole


def recipe(tiers: TierOptions, num_blocks: int | None = 64) -> EngineRecipe:
    options = EngineOptions(num_blocks=num_blocks, dtype="float32", max_num_seqs=4)
    made = EngineRecipe(find_model(None), options, tiers, ServerConfig(), threads=1, neighbours=4)
    again: EngineRecipe = pickle.loads(pickle.dumps(made))  # it is made in another process
    assert again == made
    return again


@pytest.fixture(autouse=True)
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_replicas_take_equal_shares_of_what_one_would_take() -> None:
    alone = EngineRecipe(find_model(None), EngineOptions(max_num_seqs=4), TierOptions(), ServerConfig(), 1, 1)()
    with alone.llm, recipe(TierOptions(), None)().llm as share:
        assert share.core.sizes.total_blocks == alone.sizes.total_blocks // 4


def test_each_replica_has_a_part_of_the_directory(tmp_path: Path) -> None:
    tiers = TierOptions(disk=tmp_path / "chats", disk_size="4MB")
    first, second = recipe(tiers)(), recipe(tiers)()
    try:
        assert sorted(path.name for path in (tmp_path / "chats").iterdir()) == ["replica-0", "replica-1"]
    finally:
        first.llm.close()
        second.llm.close()
    with recipe(tiers)().llm:
        assert len(list((tmp_path / "chats").iterdir())) == 2
    (tmp_path / "theirs" / "replica-0").mkdir(parents=True)
    (tmp_path / "theirs" / "replica-0" / "thesis.tex").write_text("years of work")
    with pytest.raises(Exception, match="thesis.tex"):
        recipe(TierOptions(disk=tmp_path / "theirs", disk_size="4MB"))()


def test_a_prompt_to_be_pinned_that_cannot_be_read_stops_a_replica(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="warm: cannot read"):
        recipe(TierOptions(warm=(str(tmp_path / "none.txt"),)))()
    with pytest.raises(Failure, match="--disk-size"):
        TierOptions(disk=tmp_path)


def test_all_replicas_read_the_one_directory_of_another_server(tmp_path: Path) -> None:
    folder = tmp_path / "replica-0"
    with recipe(TierOptions(disk=tmp_path, disk_size="4MB"))().llm:
        readers = [recipe(TierOptions(disk=folder, disk_read_only=True))() for _ in range(2)]
        for engine in readers:
            engine.llm.close()
    assert [path.name for path in tmp_path.iterdir()] == ["replica-0"]
