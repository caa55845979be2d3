from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pagedkv.engine import SamplingParams
from pagedkv.engine import text as text_module
from pagedkv.engine.request import Request
from pagedkv.engine.text import Detokenizer, OutputText, StopStrings
from pagedkv.models import shipped_model_path

CORPUS = [
    "def f(x): return x + 1",
    "the quick brown fox, don't you know .",
    "zwölf Boxkämpfer",
    "日本語 の 文 🙂👍🏽",
] * 4
SPECIAL = ["<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama2_like() -> Tokenizer:
    """A space before every text, its own sign for spaces, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<unk>", *SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    marked = [t for t in range(tokenizer.get_vocab_size()) if tokenizer.id_to_token(t) in BYTES]
    assert len(marked) == 256
    return plain_bytes(tokenizer)


def plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens as SentencePiece has them: part of the vocabulary, not special."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(content))


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS: dict[str, Any] = {
    "shipped": lambda: AutoTokenizer.from_pretrained(shipped_model_path()),
    "byte_level": byte_level,
    "llama2_like": llama2_like,
    "llama2_like_wrapped": lambda: PreTrainedTokenizerFast(
        tokenizer_object=llama2_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "metaspace": metaspace,
    "word_piece": word_piece,
}
NAMES = list(MAKERS)
SUBWORD = [name for name in NAMES if name not in ("metaspace", "word_piece")]  # those that know every character


@functools.cache
def tokenizer_of(name: str) -> Any:
    return MAKERS[name]()


def encode(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(ids if isinstance(ids, list) else ids.ids)


def decode(tokenizer: Any, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip)


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_tokens_add_up_to_their_text(name):
    tokenizer = tokenizer_of(name)
    size = tokenizer.get_vocab_size() if isinstance(tokenizer, Tokenizer) else len(tokenizer)
    special = [tokenizer.token_to_id(s) for s in SPECIAL] if isinstance(tokenizer, Tokenizer) else [0, 1]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.integers(0, size - 1), st.sampled_from(special)), max_size=24), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        whole = decode(tokenizer, ids, skip)
        assert "".join(pieces(Detokenizer(tokenizer, skip_special_tokens=skip), ids)) == whole

    check()


@pytest.mark.parametrize("name", SUBWORD)
def test_bytes_in_any_order_add_up_too(name):
    """Halves of characters, invalid bytes, valid ones that an invalid neighbour spoils."""
    tokenizer = tokenizer_of(name)
    halves = [*encode(tokenizer, "é€🙂👍🏽日\u200d")] + encode(tokenizer, "x ")

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(halves), max_size=16))
    def check(ids: list[int]) -> None:
        assert "".join(pieces(Detokenizer(tokenizer), ids)) == decode(tokenizer, ids)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_many_tokens_at_once_show_what_they_show_one_by_one(name, monkeypatch):
    monkeypatch.setattr(text_module, "AT_ONCE", 5)
    tokenizer = tokenizer_of(name)
    size = tokenizer.get_vocab_size() if isinstance(tokenizer, Tokenizer) else len(tokenizer)
    halves = [*encode(tokenizer, "é€🙂👍🏽日\u200d"), *encode(tokenizer, "x ")]
    tokens = st.lists(st.one_of(st.integers(0, size - 1), st.sampled_from(halves)), max_size=12)

    @settings(max_examples=80, deadline=None)
    @given(tokens, st.lists(tokens, max_size=6), st.booleans())
    def check(prompt: list[int], cuts: list[list[int]], skip: bool) -> None:
        slow, fast = (Detokenizer(tokenizer, prompt, skip_special_tokens=skip) for _ in range(2))
        for ids in cuts:
            assert fast.extend(ids) == "".join(map(slow.push, ids))
        assert fast.flush() == slow.flush()

    check()


def test_a_text_is_told_as_it_was_when_it_was_asked_for():
    tokenizer = tokenizer_of("shipped")
    ids = encode(tokenizer, "def f(x): return x")
    request = Request(request_id="r", prompt_token_ids=[0], params=SamplingParams(max_tokens=len(ids)))
    request.max_tokens, request.prompt_tuple = len(ids), (0,)
    text = OutputText(request, tokenizer, frozenset())
    promised = []
    for token in ids:
        text.add(token)
        promised.append(text.so_far())
    expected = [decode(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    assert [tell() for tell in promised] == expected
    assert text.text == expected[-1]


@pytest.mark.parametrize("name", SUBWORD)
def test_no_half_character_is_shown_and_nothing_is_taken_back(name):
    tokenizer = tokenizer_of(name)
    letters = st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), st.sampled_from("🙂👍🏽é a")
    )

    @settings(max_examples=150, deadline=None)
    @given(st.text(alphabet=letters, max_size=20))
    @example("👩‍👩‍👧 naïve\n")
    def check(text: str) -> None:
        ids = encode(tokenizer, text)
        whole, shown = decode(tokenizer, ids), ""
        for piece in pieces(Detokenizer(tokenizer), ids):
            shown += piece
            assert whole.startswith(shown) and "\ufffd" not in piece
        assert shown == whole

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_context(name):
    tokenizer = tokenizer_of(name)
    size = tokenizer.get_vocab_size() if isinstance(tokenizer, Tokenizer) else len(tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=20), st.lists(st.integers(0, size - 1), max_size=12))
    def check(prompt: list[int], ids: list[int]) -> None:
        before, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + ids)
        if whole.startswith(before):
            assert before + "".join(pieces(Detokenizer(tokenizer, prompt), ids)) == whole

    check()


@pytest.mark.parametrize("name", ["llama2_like", "metaspace"])
def test_a_new_word_after_the_prompt_begins_with_a_space(name):
    tokenizer = tokenizer_of(name)
    prompt, ids = encode(tokenizer, "the"), encode(tokenizer, "fox")
    assert "".join(pieces(Detokenizer(tokenizer, prompt), ids)) == " fox"
    assert "".join(pieces(Detokenizer(tokenizer), ids)) == "fox"


@pytest.mark.parametrize("name", ["llama2_like", "byte_level", "shipped"])
def test_an_emoji_comes_out_whole(name):
    tokenizer = tokenizer_of(name)
    ids = encode(tokenizer, "a🙂b")
    given_out = [piece for piece in pieces(Detokenizer(tokenizer), ids) if piece]
    assert "".join(given_out) == "a🙂b" and any("🙂" in piece for piece in given_out)
    assert len(ids) > len(given_out)  # its bytes are several tokens


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x\n", "naïve café — 東京 🚀🚀 ∑ \t\r\n", " leading", "", "🧑‍🚀" * 5]
)
def test_pieces_put_together_are_the_text(text):
    tokenizer = tokenizer_of("shipped")
    assert "".join(pieces(Detokenizer(tokenizer), encode(tokenizer, text))) == text


def test_no_piece_ends_inside_of_a_character():
    tokenizer = tokenizer_of("shipped")
    ids = encode(tokenizer, "🚀東")
    assert len(ids) > 2  # its characters take several tokens each, or this shows nothing
    assert [piece for piece in pieces(Detokenizer(tokenizer), ids) if piece] == ["🚀", "東"]


def test_bytes_that_are_no_text_come_out_at_the_end_as_the_decoder_shows_them():
    tokenizer = tokenizer_of("shipped")
    half = encode(tokenizer, "🚀")[:-1]
    *before, last = pieces(Detokenizer(tokenizer), half)
    assert before == [""] * len(half)
    assert last == tokenizer.decode(half) != ""


def test_a_prompt_that_ends_in_half_a_character():
    tokenizer = tokenizer_of("byte_level")
    ids = encode(tokenizer, "é")
    assert len(ids) == 2
    assert "".join(pieces(Detokenizer(tokenizer, ids[:1]), [*ids[1:], *encode(tokenizer, "x")])) == "éx"


def test_a_long_text_keeps_a_short_window():
    tokenizer = tokenizer_of("shipped")
    detokenizer = Detokenizer(tokenizer)
    for token in encode(tokenizer, "x = 1\n" * 2000):
        detokenizer.push(token)
        assert len(detokenizer._window) < 8


def test_a_tokenizer_without_backend():
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            assert not clean_up_tokenization_spaces
            return "".join(chr(i) for i in ids if not (skip_special_tokens and i == 0))

        def convert_tokens_to_ids(self, token: str) -> int | None:
            return None

    assert pieces(Detokenizer(Letters(), [80]), [97, 0, 98]) == ["a", "", "b", ""]
    assert pieces(Detokenizer(Letters(), skip_special_tokens=False), [97, 0]) == ["a", "\0", ""]


# ---------------------------------------------------------------- stop strings


stop_texts = st.text(alphabet="ab c", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab c", min_size=1, max_size=6), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first stop string ends, and which it is; by looking at every end."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return end, max(here, key=len)
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(stop_texts, stop_lists, st.lists(st.integers(0, 40), max_size=10), st.booleans())
@example("aab", ["ab", "aab"], [1, 2], False)
@example("ababac", ["abac", "bab"], [3], True)
def test_streamed_pieces_are_the_text_up_to_the_first_stop(text, stops, cuts, include):
    found = first_stop(text, stops)
    if found is None:
        expected = text
    else:
        expected = text[: found[0] if include else found[0] - len(found[1])]
    stopper, shown = StopStrings(stops, include=include), ""
    for piece in pieces_of(text, cuts):
        shown += stopper.push(piece)
        assert expected.startswith(shown)
        if stopper.matched is not None:
            break
    assert shown + stopper.flush() == expected
    assert stopper.matched == (found[1] if found else None)


@given(stop_texts, stop_lists)
def test_what_is_held_back_is_exactly_what_may_begin_a_stop(text, stops):
    stopper, shown = StopStrings(stops), ""
    for place, character in enumerate(text):
        shown += stopper.push(character)
        if stopper.matched is not None:
            return
        seen = text[: place + 1]
        held = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert shown == seen[: len(seen) - held]


def test_a_stop_across_pieces():
    stopper = StopStrings(["</s>"])
    assert [stopper.push(piece) for piece in ("hello<", "/", "b></", "s> gone")] == ["hello", "", "</b>", ""]
    assert stopper.matched == "</s>"
    assert stopper.push("more") == "" and stopper.flush() == ""


def test_unsearched_pieces_pass_and_do_not_begin_a_stop():
    stopper = StopStrings(["abc"])
    assert stopper.push("xa") == "x"
    assert stopper.push("b", search=False) == "ab"
    assert stopper.push("c") == "c" and stopper.matched is None
    assert stopper.push("abc") == "" and stopper.matched == "abc"


@pytest.mark.parametrize("stop", ["a" * 50_000, "a" * 49_999 + "b"])
def test_long_stop_strings_cost_no_more_than_the_text(stop):
    """Quadratic work would take minutes here; the suite's time limit is the judge."""
    stopper, shown = StopStrings([stop]), ""
    for _ in range(49_999):
        shown += stopper.push("a")
    assert (shown, stopper.push("c")) == ("", "a" * 49_999 + "c")
