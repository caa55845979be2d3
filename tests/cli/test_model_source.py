"""Where a model comes from: folders, GGUF files, the local Hugging Face cache, the hub."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from tests.cli.commands import call
from tests.cli.models import write_gguf

from pagedkv.cli import model_source
from pagedkv.cli.model_source import find_model
from pagedkv.cli.terminal import Failure
from pagedkv.errors import MissingExtra
from pagedkv.models import shipped_model_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def put_into(hub: Path, name: str, commit: str, ref: str = "main") -> Path:
    home = hub / f"models--{name.replace('/', '--')}"
    folder = Path(shutil.copytree(shipped_model_path(), home / "snapshots" / commit))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    return folder


def test_without_a_name_it_is_the_shipped_model():
    source = find_model(None)
    assert source.path == shipped_model_path() and source.name == "pysmall" and not source.is_gguf


def test_a_name_is_found_in_the_local_cache_by_its_main_branch_or_a_revision(hub):
    main, other = put_into(hub, "someone/py-small", "a" * 40), put_into(hub, "someone/py-small", "b" * 40, "v2")
    assert find_model("someone/py-small") == model_source.ModelSource(main, "someone/py-small")
    assert find_model("someone/py-small@v2").path == other
    assert find_model("someone/py-small@" + "b" * 40).path == other


def test_a_folder_that_is_there_goes_before_a_name(hub, tmp_path, monkeypatch):
    put_into(hub, "someone/py-small", "a" * 40)
    shutil.copytree(shipped_model_path(), tmp_path / "someone" / "py-small")
    monkeypatch.chdir(tmp_path)
    assert find_model("someone/py-small").path == Path("someone/py-small")


def test_a_snapshot_without_weights_says_so(hub):
    (put_into(hub, "someone/py-small", "a" * 40) / "model.safetensors").unlink()
    with pytest.raises(Failure, match="holds no weights"):
        find_model("someone/py-small")


@pytest.mark.parametrize("name", ["./someone/model", "/nowhere/model", "~/none/here", "a/b/c", "gpt 2"])
def test_a_path_is_never_asked_for_at_the_hub(hub, name, monkeypatch):
    monkeypatch.setattr(model_source, "_hub", None)
    with pytest.raises(Failure, match="there is no folder"):
        find_model(name)


def test_a_hub_that_does_not_answer_is_left_soon_with_a_line_that_says_what_to_do(hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(model_source, "HUB_SECONDS", 0.05)
    result = call("generate", "x", "--model", "someone/else")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    for told in (
        "--model: there is no folder someone/else, and no model of that name in the Hugging Face cache",
        "https://huggingface.co cannot be reached (no answer within 0.05 s)",
        "give the folder or the GGUF file of a model that is on this machine",
    ):
        assert told in result.stderr


def test_what_the_hub_refuses_is_told_apart(hub, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def refuse(kind):
        def answer(*_, **__):
            raise kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))

        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse(GatedRepoError))
    with pytest.raises(Failure, match="whoever has accepted its terms"):
        find_model("someone/else")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse(RepositoryNotFoundError))
    with pytest.raises(Failure, match="nor at https://huggingface.co$"):
        find_model("someone/else")


def test_a_hub_that_can_be_reached_fills_the_cache(hub, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(put_into(hub, name, "c" * 40))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("someone/else").path.name == "c" * 40 and find_model("someone/else").name == "someone/else"
    assert asked == [("someone/else", None)]


def test_an_offline_hub_is_not_asked(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failure, match="not asked, as HF_HUB_OFFLINE is set"):
        find_model("someone/else")


# GGUF files.


def test_a_gguf_file_writes_what_its_folder_writes(tmp_path):
    file = tmp_path / "py-small.gguf"
    write_gguf(file)
    assert find_model(file) == model_source.ModelSource(file, "py-small")
    options = ("def mean(values):", "--dtype", "float32", "--temperature", 0, "--max-new-tokens", 12, "--no-echo")
    from_file, from_folder = call("generate", *options, "--model", file), call("generate", *options)
    assert from_file.exit_code == 0, from_file.stderr
    assert from_file.stdout == from_folder.stdout


def test_a_gguf_file_without_what_reads_it_names_the_extra(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and more")
    monkeypatch.setattr(model_source, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[gguf\]'"):
        find_model(file)


def test_a_folder_of_gguf_files_names_one(tmp_path):
    (tmp_path / "m-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(Failure, match=r"no config.json.*give it the file itself: .*m-Q4\.gguf"):
        find_model(tmp_path)
