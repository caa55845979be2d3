"""Shell completion: what a shell is told when Tab is pressed, and what is installed for it."""

from __future__ import annotations

import pytest
from tests.cli.commands import call


def completed(shell: str, *words: str) -> str:
    told = {
        "_PAGEDKV_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(("pagedkv", *words)),
        "COMP_CWORD": str(len(words)),
        "_TYPER_COMPLETE_ARGS": " ".join(("pagedkv", *words)),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return call(env=told).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell):
    assert "generate" in completed(shell, "ge") and "serve" not in completed(shell, "ge")
    assert "--max-queue" in completed(shell, "serve", "--max-q")


def test_the_script_of_a_shell_is_shown():
    said = call("--show-completion", "bash")
    assert said.exit_code == 0 and "complete -o default -F _pagedkv_completion pagedkv" in said.stdout


def test_it_is_installed_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = call("--install-completion", "bash")
    assert said.exit_code == 0, said.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and any("_pagedkv_completion" in path.read_text() for path in files)
