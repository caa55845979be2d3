"""Structured output: what is refused, and that every text follows its grammar, whatever else is asked of it."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys

import jsonschema_rs
import numpy as np
import pytest
import torch
from tests.schemas import random_schema
from tokenizers import Tokenizer, models

from pagedkv.engine import LLM, AsyncEngine, EngineCore, SamplingParams, Structured, token_grammar
from pagedkv.engine import structured as structured_module
from pagedkv.engine.sampler import Sampler, SampleResult, SampleRow
from pagedkv.engine.sampling_kernels import forbid
from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.models import shipped_model_path

pytest.importorskip("transformers")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = "record = "
SETTINGS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "nucleus": {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "seed": 5},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {token: 100.0 for token in range(40, 90)}},
    "lookup": {"prompt_lookup": 8},
    "drawn with lookup": {"prompt_lookup": 8, "temperature": 1.0, "seed": 3},
    "logprobs": {"logprobs": 2},
    "least length": {"min_tokens": 60},
    "endless": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def llm():
    return LLM(shipped_model_path(), num_blocks=256)


def texts_of(llm, structured, **options):
    (output,) = llm.generate(PROMPT, SamplingParams(structured=structured, **{"max_tokens": 200, **options}))
    return output.outputs


def assert_follows(text, schema):
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(text))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_text_follows_its_schema_however_it_is_chosen(llm, name):
    (text,) = texts_of(llm, Structured(json=PERSON), **SETTINGS[name])
    assert text.finish_reason == "stop"
    assert_follows(text.text, PERSON)
    if name == "logprobs":
        assert len(text.logprobs) == len(text.token_ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_drafts_do_not_change_a_structured_text(llm, options):
    schema = {"type": "array", "items": PERSON, "minItems": 4, "maxItems": 4}
    before = llm.stats()
    (plain,) = texts_of(llm, Structured(json=schema), **options)
    (drafted,) = texts_of(llm, Structured(json=schema), prompt_lookup=8, **options)
    assert drafted.token_ids == plain.token_ids
    assert llm.stats().accepted_tokens > before.accepted_tokens


def test_samples_of_one_prompt_follow_it_each_in_its_own_way(llm):
    texts = texts_of(llm, Structured(json=PERSON), n=6, temperature=1.0, seed=1)
    assert len({text.text for text in texts}) > 1
    for text in texts:
        assert text.finish_reason == "stop"
        assert_follows(text.text, PERSON)


def test_a_text_follows_a_regular_expression_from_end_to_end(llm):
    pattern = "[0-9]{3}-[a-f]{2,5}(x|yz)"
    for seed in range(5):
        (text,) = texts_of(llm, Structured(regex=pattern), temperature=1.5, seed=seed)
        assert re.fullmatch(pattern, text.text)


def test_a_text_is_one_of_the_choices_letter_by_letter(llm):
    choice = ("yes", "no\n", 'she said "β→ 😀" \\ ')
    found = {texts_of(llm, Structured(choice=choice), temperature=5.0, seed=seed)[0].text for seed in range(40)}
    assert found == set(choice)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "SELECT " NAME (", " NAME){0,2}\nNAME: /[a-z]{1,6}/',
        'root ::= "SELECT " name (", " name){0,2}\nname ::= [a-z]{1,6}',
    ],
)
def test_a_text_follows_a_grammar_in_lark_or_gbnf(llm, grammar):
    for seed in range(3):
        (text,) = texts_of(llm, Structured(grammar=grammar), temperature=1.0, seed=seed)
        assert re.fullmatch("SELECT [a-z]{1,6}(, [a-z]{1,6}){0,2}", text.text)


def test_any_object_is_one(llm):
    (text,) = texts_of(llm, Structured(json=True), max_tokens=400, temperature=0.3, seed=4)
    assert text.finish_reason == "length" or isinstance(json.loads(text.text), dict)


def test_the_schema_that_everything_follows_is_one():
    assert Structured(json="true") == Structured(json={}) == Structured(json="{}")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "2023-02-28", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31"]),
        ("time", ["23:59:59Z", "00:00:00.25+01:00"], ["14:34:60-05:48"]),
        ("date-time", ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2023-02-28T10:00:60Z"]),
        ("email", ["a@b.org", "first.last@mail.example.co.uk"], [f"{'a' * 65}@b.org", f"a@{'b' * 64}.org"]),
    ],
)
def test_formats_are_followed_to_the_letter(llm, name, right, wrong):
    schema = {"$defs": {"format": {"type": "string", "format": name}}, "$ref": "#/$defs/format"}
    start = llm.core.grammars.compile(Structured(json=schema))
    is_valid = jsonschema_rs.validator_for(schema, validate_formats=True).is_valid

    def follows(text):
        state = start.copy(llm.tokenizer(json.dumps(text), add_special_tokens=False)["input_ids"])
        return state.is_complete and not state.fault

    for text in right + wrong:
        assert follows(text) == is_valid(text) == (text in right), text


def test_data_of_a_schema_is_left_alone_by_what_makes_formats_exact():
    timed = {"type": "string", "format": "time"}
    asked = {"enum": [{"format": "time"}, "x"], "properties": {"enum": timed}, "default": timed}
    made = json.loads(Structured(json=asked).definition)["grammars"][0]["json_schema"]
    assert (made["enum"], made["default"]) == (asked["enum"], timed)
    assert made["properties"]["enum"] == {**timed, "allOf": [{"pattern": "^[^:]*:[^:]*:[0-5]"}]}
    assert json.loads(Structured(json=asked).json) == asked


def test_whitespace_is_what_was_asked_for(llm):
    (text,) = texts_of(llm, Structured(json=PERSON, whitespace=""), temperature=1.0, seed=1)
    assert text.text == json.dumps(json.loads(text.text), separators=(",", ":"), ensure_ascii=False)


def test_a_text_ends_with_the_token_that_completes_it(llm):
    (text,) = texts_of(llm, Structured(regex="ab?c"), min_tokens=30, max_tokens=40)
    assert (text.text in ("abc", "ac"), text.finish_reason, text.stop_reason) == (True, "stop", None)
    assert not set(text.token_ids) & set(llm.core.eos_token_ids)


def test_the_grammar_has_the_last_word_where_everything_it_allows_is_ruled_out(llm):
    (empty,) = texts_of(llm, Structured(regex="a{0}"), min_tokens=5)
    assert (empty.text, len(empty.token_ids), empty.finish_reason) == ("", 1, "stop")
    grammar = llm.core.grammars.compile(Structured(choice=["yes"])).copy()
    row = SampleRow("r", SamplingParams(structured=Structured(choice=["yes"])), [0], seed=1, grammar=grammar)
    logits = torch.full((1, llm.sizes.vocab_size), -torch.inf)
    logits[0, llm.encode("no")[-1]] = 1.0
    (token,) = Sampler().sample(logits, [row]).token_ids.tolist()
    assert "yes".startswith(llm.tokenizer.decode([token]))


def test_a_token_that_the_grammar_does_not_allow_is_not_passed_over(llm):
    class Wilful:
        def sample(self, logits, rows):
            return SampleResult(np.full(len(rows), llm.encode("no")[-1]), None)

    core = EngineCore(llm.core.runner, tokenizer=llm.tokenizer, eos_token_ids=llm.core.eos_token_ids, sampler=Wilful())
    core.add(llm.request(PROMPT, SamplingParams(structured=Structured(choice=["yes"]))))
    (output,) = core.step()
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].stop_reason.startswith("structured: ")


def test_the_end_token_comes_only_where_the_grammar_may_end(llm):
    eos = dict.fromkeys(llm.core.eos_token_ids, 100.0)
    (text,) = texts_of(llm, Structured(regex="[0-9]{4,}"), logit_bias=eos)
    assert re.fullmatch("[0-9]{4,}", text.text) and len(text.text) < 10
    assert text.stop_reason in llm.core.eos_token_ids


def test_max_tokens_cuts_a_text_and_says_so(llm):
    (text,) = texts_of(llm, Structured(json=PERSON), max_tokens=5)
    assert (text.finish_reason, len(text.token_ids)) == ("length", 5)
    (whole,) = texts_of(llm, Structured(choice=["yes"]), max_tokens=len(llm.encode("yes")))
    assert (whole.text, whole.finish_reason) == ("yes", "stop")


def test_rows_without_structure_are_as_they_are_without_structured_ones_beside_them(llm):
    free = SamplingParams(max_tokens=24, temperature=0.8, seed=7)
    (alone,) = llm.generate(PROMPT, free)
    params = [free, SamplingParams(structured=Structured(json=PERSON), max_tokens=200), free]
    outputs = llm.generate([PROMPT] * 3, params)
    assert [outputs[place].outputs[0].token_ids for place in (0, 2)] == [alone.outputs[0].token_ids] * 2
    assert_follows(outputs[1].outputs[0].text, PERSON)


def test_many_structured_texts_at_once_are_as_each_alone(llm):
    seeds = range(token_grammar.BESIDE_EACH_OTHER + 4)
    params = [SamplingParams(structured=Structured(json=PERSON), max_tokens=60, temperature=1.0, seed=s) for s in seeds]
    together = [output.outputs[0].token_ids for output in llm.generate([PROMPT] * len(params), params)]
    assert together[:3] == [llm.generate(PROMPT, each)[0].outputs[0].token_ids for each in params[:3]]


def test_preempted_texts_go_on_where_their_grammar_stood():
    schema = {"type": "array", "items": PERSON, "minItems": 4, "maxItems": 4}
    params = [
        SamplingParams(structured=Structured(json=schema, whitespace=""), max_tokens=220, temperature=1.0, seed=seed)
        for seed in range(4)
    ]
    roomy, tight = LLM(shipped_model_path(), num_blocks=256), LLM(shipped_model_path(), num_blocks=20)
    wanted = [output.outputs[0].token_ids for output in roomy.generate([PROMPT] * 4, params)]
    outputs = tight.generate([PROMPT] * 4, params)
    assert tight.stats().num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    for output in outputs:
        assert_follows(output.outputs[0].text, schema)


@pytest.mark.anyio
async def test_a_stream_shows_a_structured_text_as_it_grows():
    engine = AsyncEngine(LLM(shipped_model_path(), num_blocks=64))
    params = SamplingParams(structured=Structured(json=PERSON), max_tokens=200)
    seen = [output.outputs[0].text async for output in engine.generate(PROMPT, params)]
    assert len(seen) > 3 and all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False))
    assert_follows(seen[-1], PERSON)
    with pytest.raises(InvalidOperation, match="no text follows"):
        async for _ in engine.generate(PROMPT, SamplingParams(structured=Structured(json={"$ref": "#"}))):
            pass
    await engine.shutdown()


@pytest.mark.parametrize("seed", range(20))
def test_answers_to_random_schemas_parse_and_validate(llm, seed):
    schema = random_schema(seed)
    (text,) = texts_of(llm, Structured(json=schema), max_tokens=2000, temperature=0.7, seed=seed)
    assert text.finish_reason == "stop"
    assert_follows(text.text, schema)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_answers_to_200_random_schemas_parse_and_validate(llm, seed):
    schema = random_schema(seed)
    for temperature in (0.0, 1.0):
        (text,) = texts_of(llm, Structured(json=schema), max_tokens=3000, temperature=temperature, seed=seed)
        assert text.finish_reason == "stop"
        assert_follows(text.text, schema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "structured: expected one of json, regex, choice and grammar, got none"),
        ({"json": True, "regex": "a"}, "got json and regex"),
        ({"json": False}, "json: expected a JSON Schema that can be enforced, or True, got False"),
        ({"json": "false"}, "json: expected a JSON Schema that can be enforced, got false"),
        ({"json": "[]"}, "json: expected a JSON Schema that can be enforced, got []"),
        ({"json": "{"}, "json: expected a JSON Schema that can be enforced, got no JSON"),
        ({"json": "[" * 100_000}, "got no JSON: maximum recursion depth"),
        ({"json": {"minimum": float("nan")}}, "got no JSON"),
        ({"json": {"type": "strin"}}, "got Invalid type: strin"),
        ({"json": {"not": {}}}, 'got Unimplemented keys: ["not"]'),
        ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, 'got Unimplemented keys: ["not"]'),
        ({"json": {"type": "string", "pattern": "[a"}}, "got unclosed character class"),
        ({"json": {"$ref": "http://example.org/schema"}}, "json: expected a JSON Schema that can be enforced"),
        ({"json": '{"anyOf":[' * 10_000}, "got no JSON"),
        ({"json": True, "whitespace": "("}, "unclosed group"),
        ({"regex": "a", "whitespace": ""}, "whitespace: expected json beside it, got regex"),
        ({"regex": "a("}, "regex: expected a regular expression, got"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": ""}, "regex: expected a str of 1 … 262144 characters, got 0 characters"),
        ({"regex": "\ud800"}, "regex: expected whole characters"),
        ({"regex": b"a"}, "regex: expected a str of 1 … 262144 characters, got b'a'"),
        ({"choice": []}, "choice: expected at least one string, got []"),
        ({"choice": "ab"}, "choice: expected at least one string, got 'ab'"),
        ({"choice": ["a", ""]}, "choice: expected a str of 1 …"),
        ({"grammar": "start: other"}, 'got at 1(8): unknown name: "other"'),
        ({"grammar": "hello"}, "grammar: expected a Lark or GBNF grammar, got Expected ::= at line 1"),
        ({"grammar": "root ::= other"}, "got Rule 'other' not found"),
        ({"grammar": "\n" * 200_000}, "grammar: expected a str of 0 … 8192 characters"),
    ],
)
def test_refusals_say_what_is_wrong_with_a_structure(options, message):
    with pytest.raises(InvalidOperation) as caught:
        Structured(**options)
    assert message in caught.value.reason
    assert caught.value.argument in ("structured", *Structured.__dataclass_fields__)


def test_what_no_text_can_follow_is_refused_before_it_is_queued(llm):
    with pytest.raises(InvalidOperation, match="structured: expected a schema or grammar that a text can follow"):
        texts_of(llm, Structured(json={"$ref": "#"}))
    assert not llm.core.has_work


def test_structure_goes_neither_with_beams_nor_without_a_tokenizer():
    from transformers import PreTrainedTokenizerFast

    structured = Structured(regex="a")
    with pytest.raises(InvalidOperation, match="structured: does not go with beam_width"):
        SamplingParams(structured=structured, beam_width=2)
    with pytest.raises(InvalidOperation, match="structured: expected a Structured, got {'json'"):
        SamplingParams(structured={"json": True})
    with pytest.raises(InvalidOperation, match="structured: expected none, as the engine has no tokenizer in Rust"):
        token_grammar.Grammars(None, 10, [1]).compile(structured)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(InvalidOperation, match="structured: expected none, as this tokenizer does not say"):
        token_grammar.Grammars(words, 1, [0]).compile(structured)


def test_a_parser_that_meets_a_limit_ends_its_text_alone(llm, monkeypatch):
    schema = {
        "type": "object",
        "properties": {f"p{place}": {"type": "string"} for place in range(700)},
        "required": ["p699"],
    }
    limits = structured_module.parser_limits()
    few = type(limits)(max_items_in_row=200, verbose_errors=False)
    monkeypatch.setattr(token_grammar, "parser_limits", lambda: few)
    wide = SamplingParams(structured=Structured(json=schema), max_tokens=8)
    broken, other = llm.generate([PROMPT] * 2, [wide, SamplingParams(max_tokens=8)])
    text = broken.outputs[0]
    assert text.finish_reason == "abort"
    assert text.stop_reason.startswith("structured: Parser Error: Current row has")
    assert other.outputs[0].finish_reason == "length"


def test_few_compiled_grammars_are_kept_and_the_last_used_ones(llm, monkeypatch):
    monkeypatch.setattr(token_grammar, "MOST_KEPT", 2)
    grammars = token_grammar.Grammars(llm.tokenizer, 4096, llm.core.eos_token_ids)
    one, two, three = (Structured(regex=pattern) for pattern in ("one", "two", "three"))
    first = grammars.compile(one)
    grammars.compile(two)
    assert grammars.compile(Structured(regex="one")) is first
    grammars.compile(three)
    assert (grammars.kept(one), grammars.kept(two)) == (first, None)


def test_long_grammars_are_not_kept_beside_each_other(llm, monkeypatch):
    grammars = token_grammar.Grammars(llm.tokenizer, 4096, llm.core.eos_token_ids)
    one, two = Structured(regex="one"), Structured(regex="two")
    monkeypatch.setattr(token_grammar, "MOST_CHARACTERS_KEPT", len(two.definition))
    grammars.compile(one)
    last = grammars.compile(two)
    assert (grammars.kept(one), grammars.kept(two)) == (None, last)


@pytest.mark.parametrize("end", [7, 300])
def test_a_text_may_end_by_the_tokens_that_end_texts_of_the_model(llm, end):
    state = token_grammar.Grammars(llm.tokenizer, 4096, [end]).compile(Structured(regex="x?"))
    (mask,) = state.tokens.masks([state])
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert allowed[end] and not allowed[llm.tokenizer.eos_token_id]


def test_a_structure_can_be_sent_to_another_process():
    structured = Structured(json=PERSON, whitespace=" ?")
    assert pickle.loads(pickle.dumps(structured)) == structured
    assert json.loads(structured.json) == PERSON


@pytest.mark.parametrize("vocab", [31, 32, 101, 4096])
def test_masks_rule_out_what_they_do_not_name_in_their_rows_alone(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(5, vocab)).astype(np.float32)
    allowed = rng.random((2, -(-vocab // 32) * 32)) < 0.5
    masks = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    wanted = logits.copy()
    for row, named in zip((3, 1), allowed, strict=True):
        wanted[row, ~named[:vocab]] = -np.inf
    forbid(logits, np.array([3, 1]), masks)
    np.testing.assert_array_equal(logits, wanted)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[structured\]'"):
        Structured(regex="a")


def test_the_engine_does_not_load_the_library_before_it_is_needed():
    code = "import sys, pagedkv.engine.core, pagedkv.engine.llm; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
