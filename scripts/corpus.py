"""The text that the shipped model learns from, and its tokenizer.

The text is the source of Python's own standard library, as the running interpreter has it. It is there wherever
Python is, so anyone can repeat the training. Every file is either for training or held out; a hash of its name
decides, so the split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<|file|>"
EOS = "<|end|>"

#: Folders left out: other people's packages, and packages that are mostly tables rather than code.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "pydoc_data", "encodings"})

#: Folders of tests: twice as much text as the library itself, and much more alike.
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

#: One file in this many is held out.
HELD_OUT_ONE_IN = 20

#: How text falls apart before byte pairs merge. A newline keeps its indentation, so one token can end a line and
#: open the next; a word, a number and a run of punctuation each keep one space in front of them.
PIECES = (
    r"(?:\r?\n)+[ \t]*"
    r"| ?[^\W\d]+"
    r"| ?\d{1,3}"
    r"| ?[^\s\w]+"
    r"|[ \t]+(?=[ \t])"
    r"|\s"
)


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes
    ----------
    name : str
        Path below the library's folder, with forward slashes.
    text : str
        What the file says, newlines as they are.
    """

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this file."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to the library's own tests."""
        return not TEST_FOLDERS.isdisjoint(self.name.split("/"))


def standard_library() -> Iterator[Document]:
    """Yield every file of the standard library that the model may see, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield Document(name.as_posix(), text)


def select(*, held_out: bool, tests: bool) -> list[str]:
    """Return the texts to learn from, or the held-out ones; of the library, or of its tests."""
    return [d.text for d in standard_library() if (d.held_out, d.is_test) == (held_out, tests)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary.

    Every byte is a token, so any text can be written and comes back exactly; :data:`BOS` is put in front of what
    is encoded.

    Parameters
    ----------
    texts : iterable of str
    vocab_size : int
        Tokens in all, the two special ones and the 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
