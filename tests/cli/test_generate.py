from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import msgspec
import pytest
import torch
from tests.cli.commands import call
from tests.cli.models import chat_folder
from tests.engine.fakes import FakeRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedkv.cli.generate import GenerateReport, facts_of
from pagedkv.cli.warmup import Clock
from pagedkv.cli.writing import written_by
from pagedkv.engine import EngineCore, Request, SamplingParams
from pagedkv.models import shipped_model_path

PROMPT = "def fibonacci(n):\n    "


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(shipped_model_path(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model_path(), local_files_only=True)


def report_of(*arguments: object, **options) -> GenerateReport:
    result = call("generate", *arguments, "--json", **options)
    assert result.exit_code == 0, result.stderr
    line, _, rest = result.stdout.partition("\n")
    assert rest == ""
    return msgspec.json.decode(line, type=GenerateReport, strict=True)


def stock(model, tokenizer, prompt: str, **options) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**ids, do_sample=False, **options)[0, ids["input_ids"].shape[1] :]
    return written.tolist()


def figures(stderr: str) -> dict[str, str]:
    """Read the table back: name and value of each row."""
    rows = (line.split("  ", 1) for line in stderr.splitlines() if "  " in line.strip())
    return {row[0].strip(): row[1].strip() for row in rows}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_greedy_text_is_that_of_the_stock_model(model, tokenizer, block_size):
    report = report_of(PROMPT, "--temperature", 0, "--max-new-tokens", 24, "--block-size", block_size)
    assert report.token_ids == [stock(model, tokenizer, PROMPT, max_new_tokens=24)]
    assert report.texts == [tokenizer.decode(report.token_ids[0])]


def test_beams_are_those_of_the_stock_model(model, tokenizer):
    report = report_of(PROMPT, "--beams", 3, "--max-new-tokens", 16)
    assert report.token_ids == [stock(model, tokenizer, PROMPT, max_new_tokens=16, num_beams=3)]
    assert report.blocks.shared > 0


def test_the_same_seed_writes_the_same_and_another_does_not():
    first, second, other = (report_of(PROMPT, "--max-new-tokens", 16, "--seed", seed) for seed in (7, 7, 8))
    assert first.token_ids == second.token_ids != other.token_ids
    assert first.seed == 7


def test_temperature_and_top_p_are_used():
    greedy = report_of(PROMPT, "--max-new-tokens", 16, "--temperature", 0)
    narrow = report_of(PROMPT, "--max-new-tokens", 16, "--temperature", 1, "--top-p", 1e-6)
    wide = report_of(PROMPT, "--max-new-tokens", 16, "--temperature", 5)
    assert narrow.token_ids == greedy.token_ids != wide.token_ids


def test_samples_share_the_blocks_of_the_prompt(tokenizer):
    report = report_of(PROMPT, "-n", 3, "--max-new-tokens", 12, "--block-size", 4)
    prompt_tokens = len(tokenizer(PROMPT)["input_ids"])
    assert report.prompt_tokens == prompt_tokens and report.cached_tokens == 0
    assert len(set(report.texts)) == 3 and len(report.token_ids) == 3
    assert report.new_tokens == sum(map(len, report.token_ids))
    # The full blocks of the prompt are held once for all; the rest is each sample's own.
    assert report.blocks.shared == (prompt_tokens - 1) // 4
    alone = report_of(PROMPT, "-n", 1, "--max-new-tokens", 12, "--block-size", 4)
    assert report.blocks.used < 3 * alone.blocks.used
    assert report.memory.paged < report.memory.contiguous


def test_samples_copy_the_unfinished_block_of_the_prompt():
    report = report_of(PROMPT, "-n", 3, "--max-new-tokens", 4, "--block-size", 64)
    assert report.blocks.copied == 2 and report.blocks.shared == 0 and report.blocks.used == 3


def test_figures_of_a_run_add_up():
    report = report_of(PROMPT, "--max-new-tokens", 20, "--block-size", 4, "--num-blocks", 50)
    blocks, tokens = report.blocks, report.prompt_tokens + len(report.token_ids[0])
    assert blocks.total == 50 and blocks.block_size == 4 and blocks.copied == blocks.shared == 0
    assert blocks.used == blocks.peak == -(-(tokens - 1) // 4)  # the last token has no K and V yet
    per_token = 2 * 4 * 4 * 32 * 2  # K and V, layers, heads, head_dim, bytes
    assert report.memory.paged == blocks.peak * 4 * per_token
    assert report.memory.contiguous == (report.prompt_tokens + 20) * per_token
    assert report.tokens_per_second == pytest.approx(len(report.token_ids[0]) / report.seconds)
    assert report.model == str(shipped_model_path()) and report.prompt == PROMPT and report.dropped_tokens == 0


@pytest.mark.parametrize("strategy", ["lfu", "longest_first", "priority:levels=3", "streaming_llm:4,64"])
def test_no_strategy_changes_the_text(model, tokenizer, strategy):
    report = report_of(PROMPT, "--max-new-tokens", 6, "--temperature", 0, "--strategy", strategy)
    assert report.token_ids == [stock(model, tokenizer, PROMPT, max_new_tokens=6)]


def test_another_model_folder(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    other = LlamaForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = report_of(PROMPT, "--model", tmp_path, "--temperature", 0, "--max-new-tokens", 10, "--device", "cpu")
    assert report.token_ids == [stock(other, tokenizer, PROMPT, max_new_tokens=10, pad_token_id=0)]
    assert report.model == str(tmp_path)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "# user: say it\n# assistant:"),
        (["--system", "Be brief."], "# system: Be brief.\n# user: say it\n# assistant:"),
        (["--raw"], "say it"),
        (["--no-chat-template"], "say it"),
    ],
)
def test_a_prompt_is_written_as_the_chat_template_has_it(chat_model, model, tokenizer, options, said):
    report = report_of("say it", "--model", chat_model, "--temperature", 0, "--max-new-tokens", 8, *options)
    ids = tokenizer(said, add_special_tokens=said == "say it", return_tensors="pt")
    written = model.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :].tolist()
    assert report.prompt == "say it" and report.token_ids == [written]
    assert report.prompt_tokens == ids["input_ids"].shape[1]
    assert report.chat_template == (said != "say it")


def test_the_answer_of_a_chat_stands_alone(chat_model):
    options = ("say it", "--model", chat_model, "--temperature", 0, "--max-new-tokens", 8)
    (answer,) = report_of(*options).texts
    shown, raw = call("generate", *options), call("generate", *options, "--raw")
    assert shown.stdout.rstrip("\n") == answer.rstrip("\n") and raw.stdout.startswith("say it")
    told = "the prompt is a message to model, by its chat template (--raw goes on from the text)"
    assert told in shown.stderr and "template" not in raw.stderr


def test_a_system_message_needs_a_template_that_takes_it(chat_model):
    for options, told in (
        (["--system", "x"], "--system: expected a model with a chat template"),
        (["--system", "x", "--raw"], "--system and --raw do not go together"),
        (["--system", "no", "--model", chat_model], "the chat template of the model refuses the prompt: no system"),
    ):
        result = call("generate", "say it", *options)
        assert result.exit_code == 2 and told in result.stderr and result.stderr.count("\n") == 1


def test_what_is_no_option_is_as_the_folder_has_it(tmp_path, tokenizer):
    folder = shutil.copytree(shipped_model_path(), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))  # penalties bring tokens close together
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert model.dtype == torch.float32
    settings = folder / "generation_config.json"
    given = json.loads(settings.read_text())
    options = (PROMPT, "--model", folder, "--max-new-tokens", 24, "--temperature")
    plain = stock(model, tokenizer, PROMPT, max_new_tokens=24)
    penalised = stock(model, tokenizer, PROMPT, max_new_tokens=24, repetition_penalty=1.8)
    settings.write_text(json.dumps(given | {"repetition_penalty": 1.8}))
    assert report_of(*options, 0).token_ids == [penalised] != [plain]
    settings.write_text(json.dumps(given | {"do_sample": True, "top_k": 1}))
    assert report_of(*options, 3).token_ids == [plain]


def test_a_small_model_runs_on_one_thread_and_leaves_torch_as_it_was(monkeypatch):
    from pagedkv.cli.terminal import threads_for

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small, large = 10**6, 10**9
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads_for(large):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyboardInterrupt), threads_for(small):
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with threads_for(small):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- without end


def test_streaming_goes_on_in_a_fixed_pool():
    options = ("--stream", "--sink-tokens", 2, "--window-tokens", 14, "--block-size", 4)
    report = report_of(PROMPT, *options, "--max-new-tokens", 60)
    assert len(report.token_ids[0]) == 60
    assert report.dropped_tokens == report.prompt_tokens + 60 - 16
    assert report.blocks.total == report.blocks.peak == 6  # the sinks take 1, the window 4, and 1 for its ragged ends
    again = report_of(PROMPT, *options, "--max-new-tokens", 30)
    assert again.token_ids[0] == report.token_ids[0][:30]


def test_streaming_is_the_plain_text_as_long_as_the_window_holds_all(model, tokenizer):
    report = report_of(PROMPT, "--stream", "--max-new-tokens", 16, "--temperature", 0)
    assert report.token_ids == [stock(model, tokenizer, PROMPT, max_new_tokens=16)]
    assert report.dropped_tokens == 0


# ---------------------------------------------------------------- what is shown


def test_text_goes_to_stdout_and_figures_to_stderr():
    report = report_of(PROMPT, "--max-new-tokens", 12)
    result = call("generate", PROMPT, "--max-new-tokens", 12)
    assert result.exit_code == 0 and result.stdout.rstrip("\n") == (PROMPT + report.texts[0]).rstrip("\n")
    table = figures(result.stderr)
    assert table["prompt tokens"] == str(report.prompt_tokens) and table["cached tokens"] == "0"
    assert table["new tokens"] == str(report.new_tokens)
    assert table["blocks used"].startswith(f"{report.blocks.used} of {report.blocks.total} ")
    assert table["blocks shared"] == table["blocks copied"] == "0"
    assert "a contiguous cache: " in table["memory"] and float(table["tokens/s"].replace(",", "")) > 0


def test_the_table_tells_compiling_apart_and_no_factor_below_one():
    (_, fast), *_ = [row for row in facts_of(figures_with(compile_seconds=0.0)) if row[0] == "tokens/s"]
    rows = dict(facts_of(figures_with(compile_seconds=12.3)))
    assert rows["tokens/s"] == fast == "10.0" and rows["compiling"].startswith("12.3 s")
    assert "compiling" not in dict(facts_of(figures_with(compile_seconds=0.0)))
    assert dict(facts_of(figures_with(paged=1000, contiguous=900)))["memory"].endswith("900 B")
    assert dict(facts_of(figures_with(paged=1000, contiguous=1000)))["memory"].endswith("1,000 B")
    assert dict(facts_of(figures_with(paged=1000, contiguous=1600)))["memory"].endswith(" (1.6×)")


def figures_with(compile_seconds=0.0, paged=1000, contiguous=900) -> GenerateReport:
    report = report_of(PROMPT, "--max-new-tokens", 2)
    report.memory.paged, report.memory.contiguous = paged, contiguous
    report.new_tokens, report.seconds, report.tokens_per_second = 20, 2.0, 10.0
    report.compile_seconds = compile_seconds
    return report


def test_the_time_of_compiles_is_counted_once_and_not_as_writing(monkeypatch):
    now = iter([0.0, 3.0, 4.0, 9.0, 10.0, 12.0])  # started; ends of b, a, d, c; read
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    for name, seconds in (("b", 1.0), ("a holds b", 3.0), ("d", 2.0), ("c holds d", 4.0)):
        clock.see(name, seconds)
    assert clock.read() == (12.0 - 7.0, 7.0)


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, **options):
        return "".join(chr(97 + token) for token in ids)

    def convert_tokens_to_ids(self, token):
        return None


def shown_of(stops=(), **params) -> tuple[list[str], list[int]]:
    """Return the pieces of the first text as they are shown, and its tokens."""
    core = EngineCore(FakeRunner(64), tokenizer=Letters(), eos_token_ids=stops)
    request = Request(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(**params))
    core.add(request)
    shown: list[str] = []
    output = written_by(SimpleNamespace(core=core), request, shown.append, until_interrupted=False)
    assert "".join(shown) == output.outputs[0].text
    return shown, list(output.outputs[0].token_ids)


def test_the_prompt_is_not_shown_and_the_first_text_is():
    shown, tokens = shown_of(n=3, temperature=2.0, seed=1, max_tokens=6)
    assert shown == [chr(97 + token) for token in tokens] and len(shown) == 6


def test_drafted_tokens_are_shown_several_at_a_time():
    one_by_one, tokens = shown_of(max_tokens=24)
    several, same = shown_of(max_tokens=24, prompt_lookup=4)
    assert same == tokens and "".join(several) == "".join(one_by_one) and len(several) < len(one_by_one)


def test_nothing_is_shown_from_the_stop_token_on():
    shown, tokens = shown_of(max_tokens=12, temperature=5.0, seed=3)
    stop = next(place for place in range(4, 12) if tokens[place] not in tokens[:place])
    assert shown_of([tokens[stop]], max_tokens=12, temperature=5.0, seed=3) == (shown[:stop], tokens[: stop + 1])


@pytest.mark.parametrize("endless", [True, False])
def test_ctrl_c_ends_a_text_without_end_and_leaves_nothing_behind(endless):
    core = EngineCore(FakeRunner(16), tokenizer=Letters())
    params = SamplingParams(max_tokens=None, streaming=(2, 8)) if endless else SamplingParams(max_tokens=50)
    request = Request(request_id="r", prompt_token_ids=[1, 2, 3], params=params)
    core.add(request)
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 30:
            raise KeyboardInterrupt

    llm = SimpleNamespace(core=core)
    if endless:
        output = written_by(llm, request, show, until_interrupted=True)
        assert len(output.outputs[0].token_ids) == 30 and output.outputs[0].text == "".join(shown)
        assert core.runner.cache.used_block_count == 0 and not core.has_work
    else:
        with pytest.raises(KeyboardInterrupt):
            written_by(llm, request, show, until_interrupted=False)
        assert len(shown) == 30


def test_no_echo_leaves_the_prompt_out():
    report = report_of(PROMPT, "--max-new-tokens", 12)
    result = call("generate", PROMPT, "--max-new-tokens", 12, "--no-echo")
    assert result.stdout.rstrip("\n") == report.texts[0].rstrip("\n")


def test_the_first_sample_comes_first_and_the_others_after_it_under_headers():
    report = report_of(PROMPT, "-n", 2, "--max-new-tokens", 8)
    result = call("generate", PROMPT, "-n", 2, "--max-new-tokens", 8)
    first, second = (PROMPT + text + ("" if text.endswith("\n") else "\n") for text in report.texts)
    assert result.stdout == f"--- sample 1 of 2 ---\n{first}--- sample 2 of 2 ---\n{second}"


def test_the_prompt_comes_from_stdin():
    typed = report_of("-", "--max-new-tokens", 6, input=PROMPT)
    assert typed.prompt == PROMPT and typed.texts == report_of(PROMPT, "--max-new-tokens", 6).texts


@pytest.mark.parametrize("as_json", [False, True])
def test_the_block_map_goes_to_stderr(as_json):
    options = ["--json"] if as_json else []
    result = call("generate", PROMPT, "-n", 2, "--max-new-tokens", 8, "--block-size", 4, "--show-blocks", *options)
    assert "▓" not in result.stdout and " shared 2  " in result.stderr
    assert any(line.startswith(" 0 ▓▓█") for line in result.stderr.splitlines())


def test_the_first_compile_is_announced_in_one_line(monkeypatch):
    import logging

    from pagedkv.cli import generate

    def announce(source, device, dtype):
        logging.getLogger("pagedkv").warning("pagedkv: compiling its kernels; this happens once")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_model", announce)
    result = call("generate", "x")
    assert result.stderr == "pagedkv: compiling its kernels; this happens once\n" and result.exit_code == 130


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "a␛[2Jb\n"), (False, "a\x1b[2Jb\n")])
def test_what_a_model_writes_does_not_steer_the_terminal(monkeypatch, is_terminal, shown):
    import io

    from rich.console import Console

    from pagedkv.cli.writing import Screen

    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", out)
    with Screen("", 1, Console(file=io.StringIO()).status("x"), silent=False) as screen:
        screen.show("a\x1b[2Jb")
        screen.finish(["a\x1b[2Jb"])
    assert out.getvalue() == shown


def test_a_model_without_attention_is_refused_in_one_line(tmp_path, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = call("generate", "x", "--model", tmp_path)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "expected a model with attention layers, got MambaConfig" in result.stderr


def test_a_model_of_another_architecture_writes_too_but_cannot_stream(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
    other = GPT2LMHeadModel(config).eval()
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ("def f(", "--model", tmp_path, "--max-new-tokens", 8)
    greedy = report_of(*options, "--temperature", 0)
    assert greedy.token_ids == [stock(other, tokenizer, "def f(", max_new_tokens=8, pad_token_id=1)]
    assert report_of(*options, "-n", 2, "--block-size", 2).blocks.shared > 0
    streamed = call("generate", *options, "--stream", "--window-tokens", 20)
    assert streamed.exit_code == 2 and "rotary" in streamed.stderr.splitlines()[-1]
