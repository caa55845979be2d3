"""What docs/server.md says: its examples run, and it names every option and every field."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.local import SMALL, Process, process

pytest.importorskip("openai")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "server.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with process(tmp_path_factory.mktemp("server") / "log", *SMALL) as started:
        yield started


def examples(language: str, server: Process) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    assert len(found) >= 2
    return [example.replace("http://127.0.0.1:8000", server.url) for example in found]


def test_the_curl_examples(server: Process) -> None:
    answers = [
        subprocess.run(["bash", "-c", example], capture_output=True, text=True, check=True, timeout=60).stdout
        for example in examples("sh", server)
    ]
    told = json.loads(answers[0])
    assert told["choices"][0]["text"] and told["usage"]["completion_tokens"] <= 32
    assert answers[1].startswith("data: {") and answers[1].rstrip().endswith("data: [DONE]")


def test_the_curl_command_of_the_start_screen(server: Process) -> None:
    log = server.log.read_text()
    command = log[log.index("curl http") :].split("\n\n")[0]
    answer = subprocess.run(["bash", "-c", command.replace("curl", "curl -s", 1)], capture_output=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["text"]
    assert "calls in the form hermes" in log
    assert server.url in log and "pysmall" in log and "1,024 of 16 tokens" in log


def test_the_python_examples(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "example"}
    for example in examples("python", server):
        exec(compile(example, "server.md", "exec", dont_inherit=True), names)
    out = capsys.readouterr().out
    assert "tokens came from the cache" in out and "CompletionUsage(" in out and "name=" in out
    names["client"].close()  # type: ignore[attr-defined]


def test_the_examples_of_the_readme(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    (curl,) = [text for kind, text in found if kind == "sh"]
    (client,) = [text for kind, text in found if kind == "python" and "openai" in text]
    said = subprocess.run(["bash", "-c", curl.replace("http://127.0.0.1:8000", server.url)], capture_output=True)
    assert json.loads(said.stdout)["choices"][0]["text"]
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(client.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), names)
    assert "tokens came from the cache" in capsys.readouterr().out
    names["client"].close()  # type: ignore[attr-defined]


def test_every_option_and_every_extension_is_told() -> None:
    import typer

    from pagedkv.cli.app import app
    from pagedkv.server.schemas import GenerationFields

    page = PAGE.read_text()
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {option for each in serve.params for option in each.opts if option.startswith("--")}
    assert {"--port", "--api-key", "--max-queue"} <= options
    assert [option for option in options if f"`{option}`" not in page and f"`{option}," not in page] == []
    fields, page = GenerationFields.model_fields, page + (ROOT / "docs" / "api-fields.md").read_text()
    assert [name for name in fields if f"`{name}`" not in page and name != "model"] == []
