"""What a paged cache promises, as plain Python: lists of tokens, a trie that is replayed from events, no blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pagedkv import AllBlocksCleared, BlockRemoved, BlockStored


@dataclass
class Token:
    """A token as its owner knows it: the number that its K and V are made of, and whether they are written."""

    value: int
    written: bool = False


@dataclass
class Sequence:
    """One live sequence: the tokens that it sees."""

    salt: str
    era: int
    priority: int
    created: int
    tokens: list[Token] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the leading tokens whose ids are known
    committed: int = 0
    dropped: int = 0
    sink: int = 0
    is_opaque: bool = False
    is_pinned: bool = False
    version: int = 0  # counts changes of tokens
    taken_back_at: int | None = None  # the version at which tokens were taken back, until others are appended
    stale_before: int = 0  # plans of earlier versions are stale

    @property
    def are_ids_known(self) -> bool:
        return len(self.ids) == len(self.tokens)

    def take_back(self) -> None:
        self.version += 1
        self.taken_back_at = self.version


class Values:
    """Numbers for tokens: equal exactly where K and V are to be equal, by salt, weights and the whole history."""

    def __init__(self) -> None:
        self._known: dict[tuple, int] = {}
        self._serial = 0

    def unique(self) -> int:
        self._serial += 1
        return self._serial

    def of(self, sequence: Sequence, history: list[int]) -> int:
        key = (sequence.era, sequence.salt, *history)
        if key not in self._known:
            self._known[key] = self.unique()
        return self._known[key]


def extend(sequence: Sequence, values: Values, count: int, ids: list[int] | None) -> None:
    """Append tokens to a sequence of the model."""
    if count == 0:
        return
    follows = ids is not None and sequence.are_ids_known
    for place in range(count):
        if follows:
            sequence.ids.append(ids[place])
        exact = follows and not sequence.is_opaque
        sequence.tokens.append(Token(values.of(sequence, sequence.ids) if exact else values.unique()))
    if sequence.taken_back_at is not None:
        sequence.stale_before, sequence.taken_back_at = sequence.taken_back_at, None
    sequence.version += 1


class Index:
    """The prefix index as a subscriber sees it: rebuilt from events alone."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str]] = {}

    def receive(self, event: object) -> None:
        if isinstance(event, BlockStored):
            assert event.block_id not in self.blocks, "stored twice"
            assert event.parent_id is None or event.parent_id in self.blocks, "stored under an unknown parent"
            assert len(event.token_ids) == self.block_size
            self.blocks[event.block_id] = (event.parent_id, event.token_ids, event.cache_salt)
        elif isinstance(event, BlockRemoved):
            assert event.block_id not in self.parents, "removed before its children"
            del self.blocks[event.block_id]
        else:
            assert isinstance(event, AllBlocksCleared)
            self.blocks.clear()

    @property
    def parents(self) -> Counter[int | None]:
        return Counter(parent for parent, _, _ in self.blocks.values())

    def match(self, ids: list[int], salt: str) -> tuple[list[int], int]:
        """Return the full blocks that match `ids`, the last token left out, and the tokens of the best partial one."""
        size, path, parent = self.block_size, [], None
        while True:
            start = len(path) * size
            usable = min(size, len(ids) - 1 - start)
            shared = [
                (_common(tokens, ids[start : start + usable]), block)
                for block, (above, tokens, owner) in self.blocks.items()
                if above == parent and owner == salt and usable > 0
            ]
            best = max(shared, default=(0, None), key=lambda found: found[0])
            if best[0] < size:
                return path, best[0]
            parent = best[1]
            path.append(parent)


def _common(a: tuple[int, ...], b: list[int]) -> int:
    count = 0
    while count < len(b) and a[count] == b[count]:
        count += 1
    return count


RANKS = {
    "LRU": lambda info, created: info.last_access,
    "LFU": lambda info, created: info.access_count,
    "LongestFirst": lambda info, created: -info.num_tokens,
    "Priority": lambda info, created: (info.priority, info.last_access),
    "StreamingLLM": lambda info, created: info.last_access,
    "FIFO": lambda info, created: created,
}
"""What each strategy says of a sequence; the lowest goes first, ties by id."""
