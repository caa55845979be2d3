"""Single tokens as text, and where they stand in it."""

from __future__ import annotations

import pytest
from tests.server.fakes import shipped_tokenizer

from pagedkv.server.model import TokenText


@pytest.mark.parametrize("text", ["import os\n", "naïve café", "é漢😀 = 1", "x = '→→'  # 漢字\n"])
def test_offsets_count_characters_even_where_one_is_several_tokens(text: str) -> None:
    tokenizer = shipped_tokenizer()
    shown = TokenText(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    told = shown.completion_entries(tokens, [None] * len(tokens), 0)
    offsets = told["text_offset"]
    assert len(tokens) > 2 and offsets == sorted(offsets) and offsets[-1] + shown.length(tokens[-1]) == len(text)
    for token, offset in zip(told["tokens"], offsets, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert text[offset:].startswith(token)
