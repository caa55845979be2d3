"""``pagedkv demo``: the texts are the model's, and every figure is of that run."""

from __future__ import annotations

import re

import msgspec
import pytest
from tests.cli.commands import call
from tests.cli.models import chat_folder

from pagedkv.cli.demo import (
    METHOD_ENDS,
    METHODS,
    MODULE,
    NEW_TOKENS,
    QUESTIONS,
    SAMPLES,
    TEMPERATURE,
    DemoReport,
    Stage,
    engine_for,
    facts_of,
    perform,
    script_for,
)
from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import find_model
from pagedkv.engine import LLM, SamplingParams


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_model(None), "cpu")


@pytest.fixture(scope="module")
def performed(loaded):
    return perform(engine_for(loaded), script_for(loaded), None, model="pysmall")


def test_the_texts_are_those_that_each_prompt_gets_alone(loaded, performed):
    report, _ = performed
    params = SamplingParams(max_tokens=NEW_TOKENS, stop=METHOD_ENDS, temperature=TEMPERATURE, seed=1)
    for method, texts in list(zip(METHODS, report.texts, strict=True))[:3]:
        alone = LLM(loaded.model, loaded.tokenizer, num_blocks=32, prefix_caching=False)
        (output,) = alone.generate(f"{MODULE}    {method}", params)
        assert texts == [output.outputs[0].text]
    assert len(report.texts[-1]) == SAMPLES == len(set(report.texts[-1]))


def test_the_figures_are_of_that_run(loaded, performed):
    report, pool = performed
    ids = script_for(loaded).token_ids
    common = len(loaded.encode(MODULE)) // 16
    assert report.prompt_tokens == sum(map(len, ids))
    assert report.cached_tokens >= (len(METHODS) - 1) * common * 16 > report.prompt_tokens * 3 // 4
    assert report.blocks_shared >= common and report.blocks_peak < report.blocks_apart / 3
    fullest, size = pool.fullest, pool.cache.block_memory_bytes
    assert report.blocks_peak == (fullest.ref_count > 0).sum() and report.blocks_apart == fullest.ref_count.sum()
    assert report.paged_bytes == report.blocks_peak * size
    assert report.preallocated_bytes == (len(METHODS) - 1 + SAMPLES) * 4096 * size // 16
    written = sum(map(len, ids)) + (SAMPLES - 1) * len(ids[-1]) + report.new_tokens
    assert report.apart_bytes == written * size // 16
    rows = dict(facts_of(report))
    assert rows["texts"] == "15 at once: 12 requests, the last one with 4 samples"
    assert f"{report.blocks_peak} of 16 tokens, {report.blocks_shared} of them shared" in rows["blocks"]


def test_the_map_is_that_of_the_table():
    result = call("demo")
    assert result.exit_code == 0, result.stderr
    shared = re.search(r"blocks +(\d+) of 16 tokens, (\d+) of them shared", result.stdout)
    legend = re.search(r"active (\d+)  ▓ shared (\d+) ", result.stdout)
    assert shared and legend and shared[2] == legend[2]
    assert int(shared[1]) == int(legend[1]) + int(legend[2])
    assert all(method[: len("def add_item")] in result.stdout for method in METHODS)


def test_the_report_is_one_object():
    result = call("demo", "--json")
    report = msgspec.json.decode(result.stdout, type=DemoReport, strict=True)
    assert report.model == "pysmall" and report.tokens_per_second == pytest.approx(report.new_tokens / report.seconds)


def test_a_model_with_a_chat_template_answers_questions(tmp_path):
    chatty = load_model(find_model(chat_folder(tmp_path / "chatty")), "cpu")
    script = script_for(chatty)
    assert script.shown == QUESTIONS and script.what == "chats under one system prompt"
    assert chatty.tokenizer.decode(script.token_ids[0]).endswith(f"# user: {QUESTIONS[0]}\n# assistant:")


def test_the_screen_shows_the_end_of_each_text(loaded, capsys):
    stage = Stage(script_for(loaded))
    texts = [["\n        first\n        return 1\n"]] * 11 + [["a", "b", "\x1b[2Jc", "d"]]
    stage._console.print(stage.picture(texts))
    out = capsys.readouterr().out
    assert out.count("return 1") == 11 and "4: def find" in out and "␛[2Jc" in out and "\x1b[2J" not in out
