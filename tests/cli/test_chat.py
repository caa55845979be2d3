"""``pagedkv chat``: what is said as tokens, what is kept, what is shared, and the program around it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import stat
import subprocess
import sys
import time

import pytest
from tests.cli.commands import START, call
from tests.cli.models import chat_folder

from pagedkv.cli import chat as chat_module
from pagedkv.cli.chat import ChatOptions, Screen, Typist, _tiers, stats_of
from pagedkv.cli.chats import Chat, Chats, ChatStore, ChatTokens, Message, _behind
from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import find_model
from pagedkv.cli.terminal import Failure
from pagedkv.engine import LLM, SamplingParams
from pagedkv.models import shipped_model_path
from pagedkv.tiers import BlockFormat, DiskTier

SYSTEM = """import os
import sys


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat") / "chatty")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(find_model(folder), "cpu")


@pytest.fixture(scope="module")
def llm(loaded):
    return LLM(loaded.model, loaded.tokenizer, num_blocks=128)


@pytest.fixture
def chats(llm, loaded, tmp_path):
    llm.reset()
    params = SamplingParams(max_tokens=12, temperature=0, seed=0)
    return Chats(llm, ChatTokens(loaded), "chatty", params, Chat("first", SYSTEM), ChatStore(tmp_path / "chats"))


def quiet(piece: str) -> None:
    """Show nothing."""


# ---------------------------------------------------------------- as tokens


def test_each_form_writes_a_chat_out(loaded):
    chat = Chat("a", "S", [Message("user", "u"), Message("assistant", "v\n"), Message("user", "w")])
    assert ChatTokens(loaded).form == "template"
    assert ChatTokens(loaded).text(chat) == "# system: S\n# user: u\n# assistant: v\n\n# user: w\n# assistant:"
    assert ChatTokens(loaded, "roles").text(chat) == "system: S\n\nuser: u\n\nassistant: v\n\n\nuser: w\n\nassistant:"
    assert ChatTokens(loaded, "text").text(chat) == "S\nuv\nw"
    assert ChatTokens(load_model(find_model(None), "cpu")).form == "text"


@pytest.mark.parametrize("form", ["template", "roles", "text"])
def test_a_chat_goes_on_from_the_very_tokens_that_were_written(loaded, form):
    chat = Chat("a", None, [Message("user", "say it")])
    tokens = ChatTokens(loaded, form)
    asked = tokens.token_ids(chat)
    letters = [token for letter in "return" for token in loaded.encode_part(letter)]
    assert letters != loaded.encode_part("return")  # which the tokenizer would never write
    chat.messages += [Message("assistant", "return", letters), Message("user", "again")]
    longer = tokens.token_ids(chat)
    assert longer[: len(asked) + len(letters)] == [*asked, *letters]
    # This template puts a space before an answer, which the model wrote without.
    text = tokens.text(chat).replace("assistant: return", "assistant:return", 1)
    assert loaded.tokenizer.decode(longer, skip_special_tokens=True) == text
    assert tokens.token_ids(Chat("b", "S", chat.messages)) != longer


@pytest.mark.parametrize(
    ("text", "rest"), [("q: a\nq", "\nq"), ("q:  a \nq", " \nq"), ("q: b", None), ("p: a", None), ("q:", None)]
)
def test_what_follows_on_an_answer_is_found_whatever_space_is_around_it(text, rest):
    assert _behind(text, "q:", " a") == rest


def test_an_answer_is_that_of_the_model_to_the_written_out_chat(chats, llm):
    text = "# system: " + SYSTEM + "\n# user: def pop(self):\n# assistant:"
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    (wanted,) = llm.generate([ids], SamplingParams(max_tokens=12, temperature=0))
    shown: list[str] = []
    answer = chats.say("def pop(self):", shown.append)
    assert answer.text == "".join(shown) == wanted.outputs[0].text and answer.new_tokens == 12
    assert [message.role for message in chats.current.messages] == ["user", "assistant"]


# ---------------------------------------------------------------- what is shared


def test_the_next_message_computes_nothing_of_what_was_said(chats):
    first = chats.say("def pop(self):", quiet)
    second = chats.say("def peek(self):", quiet)
    before = first.prompt_tokens + first.new_tokens - 1  # the last token has no K and V yet
    assert first.cached_tokens == 0 and second.cached_tokens >= before // 16 * 16
    assert second.prompt_tokens > before and second.disk_tokens == 0


def test_chats_under_one_system_prompt_share_its_blocks(chats):
    chats.say("def pop(self):", quiet)
    alone = chats.sharing()
    assert alone.chats == 1 and alone.used == alone.apart > 2
    chats.new("second")
    chats.say("def is_empty(self):", quiet)
    chats.fork("third")
    both = chats.sharing()
    system = len(chats.tokens.token_ids(Chat("s", SYSTEM, [Message("user", "")]))) // 16
    assert both.chats == 3 and both.apart - both.used >= 2 * (system - 1) > 2
    assert both.cached_tokens > 0 and both.disk_tokens == 0
    rows = dict(stats_of(chats))
    assert rows["blocks"] == f"{both.used} blocks hold 3 chats; apart they would take {both.apart}"
    assert f"{both.cached_tokens} of {both.prompt_tokens} prompt tokens" in rows["not computed"]
    assert both.preallocated == 3 * 128


def test_a_fork_goes_its_own_way_and_leaves_the_chat_alone(chats):
    chats.say("def pop(self):", quiet)
    before = list(chats.current.messages)
    chats.fork("other")
    chats.say("def peek(self):", quiet)
    assert chats.current.name == "other" and len(chats.current.messages) == 4
    chats.load("first")
    assert chats.current.messages == before
    with pytest.raises(Failure, match="there is a chat 'other' already"):
        chats.new("other")


def test_retry_writes_another_answer_by_the_next_seed(chats):
    from dataclasses import replace

    with pytest.raises(Failure, match="no answer yet"):
        chats.retry(quiet)
    chats.params = replace(chats.params, temperature=2.0)
    first = chats.say("def pop(self):", quiet)
    again = chats.retry(quiet)
    assert first.text != again.text and again.cached_tokens == again.prompt_tokens - 1
    assert [message.content for message in chats.current.messages] == ["def pop(self):", again.text]


# ---------------------------------------------------------------- Ctrl-C, and what fails


def test_ctrl_c_keeps_what_was_written_and_the_chat_goes_on(chats):
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 4:
            raise KeyboardInterrupt

    answer = chats.say("def pop(self):", show)
    assert answer.finish_reason == "abort" and answer.text == "".join(shown)
    assert chats.current.messages[-1].content == answer.text
    assert chats.say("def peek(self):", quiet).finish_reason == "length"


def test_ctrl_c_before_the_first_token_takes_the_message_back(chats, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chats.llm.core, "step", interrupt)
        answer = chats.say("def pop(self):", quiet)
    assert answer.new_tokens == 0 and chats.current.messages == [] and not chats.llm.core.has_work
    chats.say("def pop(self):", quiet)
    with monkeypatch.context() as patch:
        patch.setattr(chats.llm.core, "step", interrupt)
        before = list(chats.current.messages)
        chats.retry(quiet)
    assert chats.current.messages == before


def test_a_chat_that_is_full_says_so_and_stays_as_it_was(loaded):
    small = LLM(loaded.model, loaded.tokenizer, num_blocks=3)
    chats = Chats(small, ChatTokens(loaded), "m", SamplingParams(max_tokens=100, temperature=0), Chat("a"))
    answer = chats.say("import os", quiet)
    assert answer.prompt_tokens + answer.new_tokens == 48 and answer.finish_reason == "length"
    with pytest.raises(Failure, match=r"the chat has \d+ tokens, model and pool hold 48: /new begins another"):
        chats.say("import sys", quiet)
    assert len(chats.current.messages) == 2


# ---------------------------------------------------------------- files


def test_a_chat_is_kept_in_a_file_of_its_owner(tmp_path):
    store, chat = (
        ChatStore(tmp_path / "chats"),
        Chat("tea time", "S", [Message("user", "é"), Message("assistant", "b", [1])]),
    )
    assert store.names() == []
    store.save(chat)
    store.save(Chat("other"))
    assert store.load("tea time") == chat and store.names() == ["other", "tea time"]
    assert stat.S_IMODE((tmp_path / "chats" / "tea time.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "chats").stat().st_mode) == 0o700
    assert not list((tmp_path / "chats").glob("*.new"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 101])
def test_a_name_leads_out_of_no_folder(tmp_path, name):
    with pytest.raises(Failure, match="expected a name of letters"):
        ChatStore(tmp_path).save(Chat(name))


def test_a_broken_file_or_a_missing_one_is_said(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "a", "messages": 3}')
    with pytest.raises(Failure, match="cannot read .*a.json: Expected `array`"):
        ChatStore(tmp_path).load("a")
    with pytest.raises(Failure, match="there is no chat 'b' in"):
        ChatStore(tmp_path).load("b")


def test_saving_under_another_name_renames_the_chat(chats):
    chats.say("def pop(self):", quiet)
    chats.save("stack")
    assert chats.current.name == "stack" and list(chats.open) == ["stack"] and chats.store.names() == ["stack"]


def test_answers_of_another_model_are_read_as_text(chats):
    said = [Message("user", "import os"), Message("assistant", " as o", [5, 6, 7])]
    chats.store.save(Chat("theirs", None, said, model="another"))
    chats.store.save(Chat("ours", None, said, model="chatty"))
    chats.load("theirs")
    assert [message.token_ids for message in chats.current.messages] == [[], []]
    chats.load("ours")
    assert chats.current.messages[1].token_ids == [5, 6, 7]


# ---------------------------------------------------------------- the command, over a pipe


def chat(*options: object, say: str):
    result = call("chat", *options, input=say)
    assert result.exit_code == 0, result.stderr
    return result


def test_a_pipe_gets_answers_alone(folder, tmp_path):
    options = (folder, "--no-disk", "--temperature", 0, "--max-new-tokens", 8)
    result = chat(*options, say="import os\n")
    again = chat(*options, say='"""\nimport os\n"""\n')
    assert result.stdout == again.stdout and result.stdout.count("\n") >= 1
    assert "8 tokens, " in result.stderr and "(cut after 8 tokens: --max-new-tokens)" in result.stderr


def test_yesterdays_chat_comes_from_the_disk(folder, tmp_path):
    options = (folder, "--sessions", tmp_path / "s", "--disk-size", "20MB", "--max-new-tokens", 20, "--seed", 1)
    first = chat(*options, "--load", "stack", "--system", SYSTEM, say="def pop(self):\ndef peek(self):\n/stats\n")
    assert "0 of them from the disk" in first.stderr
    second = chat(*options, "--continue", say="def clear(self):\n/chats\n")
    tokens, disk, computed = map(
        int, re.search(r"(\d+) tokens: (\d+) from the disk, (\d+) computed", second.stderr).groups()
    )
    assert tokens == disk + computed and computed <= 20 and disk > 64
    assert "chat stack: 4 messages" in second.stderr and "* stack  6 messages" in second.stderr
    assert len(ChatStore(tmp_path / "s").load("stack").messages) == 6
    blocks = tmp_path / "s" / "blocks"
    assert stat.S_IMODE(blocks.stat().st_mode) == 0o700
    assert sum(file.stat().st_size for file in blocks.rglob("*") if file.is_file()) <= 20e6


def test_a_second_program_goes_on_without_the_disk(folder, tmp_path):
    options = ChatOptions(sessions=tmp_path, disk_size="5MB")
    (tier,) = _tiers(options, find_model(folder))
    with tier.open(BlockFormat("ours", 16, 512)):
        result = chat(folder, "--sessions", tmp_path, "--disk-size", "5MB", "--max-new-tokens", 2, say="import os\n")
    assert (
        f"the disk is left alone: tier {tier.directory}" in result.stderr and f"process {os.getpid()}" in result.stderr
    )


def test_a_second_program_reads_what_the_first_has_stored(folder, tmp_path):
    say = "import os\nimport sys\nimport numpy\nimport re\n"
    given = ("--sessions", tmp_path, "--disk-size", "5MB", "--max-new-tokens", 2, "--temperature", 0)
    chat(folder, *given, say=say)
    (tier,) = _tiers(ChatOptions(sessions=tmp_path, disk_size="5MB", temperature=0), find_model(folder))
    with tier.open(DiskTier.format_of(tier.directory)) as other:
        before = other.books.cached_block_count
        result = chat(folder, *given, say=say + "/stats\n")
        assert other.books.cached_block_count == before
    assert f"the disk is read, and nothing is stored: tier {tier.directory}" in result.stderr
    assert "came from the disk" in result.stdout + result.stderr


def test_another_model_takes_the_chat_over(folder):
    say = (
        f"import os\n/new other\n/new\n/load other\n/model\n/model {shipped_model_path()}\nimport sys\n/stats\n/chats\n"
    )
    result = chat(folder, "--no-disk", "--max-new-tokens", 4, say=say)
    assert "chatty\n" in result.stderr and "pysmall has no chat template" in result.stderr
    assert "pysmall, chats written as text" in result.stderr and re.search(
        r"\* other +2 messages  import sys", result.stderr
    )
    assert result.stderr.count("  2 messages  import ") == 2 and "  0 messages" in result.stderr


class Typed:
    """Somebody at a terminal; Ctrl-C where an exception stands."""

    is_terminal = True

    def __init__(self, *lines):
        self.lines = list(lines)

    def read(self):
        return self.lines.pop(0) if self.lines else None


@pytest.mark.parametrize("fault", ["config", "weights", KeyboardInterrupt, MemoryError])
def test_a_model_that_cannot_be_loaded_leaves_the_one_before(folder, tmp_path, monkeypatch, capsys, fault):
    other = tmp_path / "broken"
    shutil.copytree(folder, other)
    if fault == "config":
        (other / "config.json").write_text('{"model_type": "no such"}')
    elif fault == "weights":
        (other / "model.safetensors").write_bytes(b"no weights")
    else:
        load = chat_module.load_model
        monkeypatch.setattr(
            chat_module,
            "load_model",
            lambda source, *rest: load(source, *rest) if source.path == folder else raises(fault),
        )
    options = ChatOptions(disk=False, max_new_tokens=2, temperature=0)
    Screen(options, Typed("import os", f"/model {other}", "/model", "import sys", "/stats")).run(find_model(folder))
    told = capsys.readouterr().err
    assert "/model broken: " in told and "Traceback" not in told
    assert told.index("/model broken: ") < told.rindex("chatty\n")
    assert re.search(r", 4 messages", told), told


def raises(error):
    raise error


def test_over_a_pipe_a_model_that_cannot_be_loaded_ends_the_program(folder, tmp_path):
    other = tmp_path / "broken"
    shutil.copytree(folder, other)
    (other / "config.json").write_text('{"model_type": "no such"}')
    result = call("chat", folder, "--no-disk", input=f"/model {other}\nimport os\n")
    assert result.exit_code == 2 and "broken" in result.stderr


def test_the_commands_do_what_help_says(folder, tmp_path):
    typed = ["/help", "/system", "/system be brief", "/system", "import os", "/save brief", "/new", "/fork copy"]
    say = "\n".join([*typed, "/load brief", "/retry", "/quit", "never said"])
    result = chat(folder, "--sessions", tmp_path, "--disk-size", "5MB", "--max-new-tokens", 3, say=say)
    for told in (
        "/retry",
        "(no system prompt)",
        "be brief\n",
        "saved as brief",
        "chat copy, a copy",
        "chat brief: 2 mess",
    ):
        assert told in result.stderr, told
    saved = ChatStore(tmp_path).load("brief")
    assert saved.system == "be brief" and len(saved.messages) == 2 and saved.model == "chatty"
    assert saved.messages[1].content in result.stdout


def test_a_system_prompt_that_the_template_refuses_changes_nothing(folder):
    result = call("chat", folder, "--no-disk", input="/system no\n")
    assert result.exit_code == 2 and "the chat template of the model refuses the prompt: no system" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--form", "xml"], "--form: expected one of template, roles, text, got 'xml'"),
        (["--form", "template"], "--form: expected roles or text, as the model has no chat template, got template"),
        (["--load", "a", "--continue"], "--load and --continue do not go together"),
        (["--load", "a", "--no-disk"], "--load does not go with --no-disk"),
        (["--disk-size", "much"], "--disk-size: expected a size such as 40GiB or 80GB, got 'much'"),
        (["--temperature", "-1"], "--temperature: expected a number in 0 … "),
        (["--weights", "int3"], "--weights: expected int8, got int3"),
        (["/nowhere"], "MODEL: there is no folder /nowhere"),
        (["--sessions", "/dev/null/x"], "--sessions: cannot write /dev/null/x"),
    ],
)
def test_an_option_that_cannot_be_is_named(options, said):
    result = call("chat", *options, input="")
    assert result.exit_code == 2 and said in result.stderr.splitlines()[-1], result.stderr


def test_an_unknown_command_over_a_pipe_ends_it_with_a_line():
    result = call("chat", "--no-disk", input="/bogus\n")
    assert result.exit_code == 2 and "there is no command /bogus: /help lists them" in result.stderr


def test_several_lines_make_a_message(monkeypatch):
    import io

    typed = 'one\ntwo\\\nmore\n"""three\n\nlines"""\n"""\nfour\n"""\n"""open\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    typist = Typist(None)
    assert [typist.read() for _ in range(6)] == ["one", "two\nmore", "three\n\nlines", "four", "open", None]


# ---------------------------------------------------------------- the command, on a terminal


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", START, *arguments]
        pipes = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {"TERM": "xterm"},
            start_new_session=True,
            preexec_fn=_own_terminal,
            **pipes,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 300, again: str = "", pause: float = 10) -> None:
        """Read until a pattern has come; type `again` after every pause."""
        deadline = time.monotonic() + seconds
        start, last = len(self.seen), time.monotonic()
        while not re.search(pattern, self.seen[start:]):
            assert time.monotonic() < deadline, self.seen
            if again and time.monotonic() > last + pause:
                self.type(again)
                last = time.monotonic()
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    assert re.search(pattern, self.seen[start:]), self.seen
                    return

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_program(folder, tmp_path):
    terminal = Terminal(
        "chat", str(folder), "--sessions", str(tmp_path), "--disk-size", "5MB", "--max-new-tokens", "3000"
    )
    terminal.wait_for(">>> ")
    terminal.type("import os\r")
    terminal.wait_for(r"\[2K(?!\s*pagedkv: compiling)[^\x1b]*\w\w")  # the spinner is gone, it writes
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)[\s\S]*>>> ")
    terminal.type("\x03")
    # Python's input() does not see a signal between its prompt and its waiting: whoever typed it types it again.
    terminal.wait_for(r"Ctrl-D or /quit ends[\s\S]*>>> ", again="\x03")
    terminal.type("/bogus\r")
    terminal.wait_for(r"there is no command /bogus[\s\S]*>>> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    (name,) = ChatStore(tmp_path).names()
    assert [message.role for message in ChatStore(tmp_path).load(name).messages] == ["user", "assistant"]
    assert (tmp_path / "history").read_text().splitlines()[-2:] == ["import os", "/bogus"]
