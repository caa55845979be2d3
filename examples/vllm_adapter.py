"""The calls of vLLM's ``KVCacheManager`` over a ``BlockManager``: what a scheduler of that shape needs of the books.

================================  ==================================================================================
vLLM                              here
================================  ==================================================================================
``get_computed_blocks(request)``  ``matching_block_ids``: nothing is held yet
``allocate_slots(request, n)``    ``allocate`` the first time, then ``append``; None where there is no room
the forward pass is done          ``commit(upto=request.num_computed_tokens)``, at the next call for the request
``request.skip_reading_…``        ``allocate(…, reuse=False)``: computed as a whole, published all the same
``free(request)``                 ``free``; committed blocks stay findable
``evict_blocks(ids)``             ``evict_block``, children first
``reset_prefix_cache()``          ``clear_prefix_cache``
``usage``, ``get_block_ids``      ``utilization``, ``get_sequence(…).block_ids``
================================  ==================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagedkv import BlockId, BlockManager, OutOfMemory


@dataclass
class Request:
    """What the manager reads of a scheduler's request; `num_computed_tokens` is the scheduler's to raise."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str = ""
    skip_reading_prefix_cache: bool = False


@dataclass
class KVCacheManager:
    num_blocks: int
    block_size: int = 16
    enable_caching: bool = True
    _numbers: dict[str, int] = field(default_factory=dict)
    _next: int = 0

    def __post_init__(self) -> None:
        self.books = BlockManager(self.num_blocks, self.block_size, prefix_caching=self.enable_caching)

    @property
    def usage(self) -> float:
        return self.books.utilization

    def get_computed_blocks(self, request: Request) -> tuple[tuple[BlockId, ...], int]:
        """Return the blocks that the request would share, and how many tokens they hold."""
        if request.skip_reading_prefix_cache:
            return (), 0
        blocks = self.books.matching_block_ids(request.all_token_ids, request.cache_salt)
        return blocks, len(blocks) * self.block_size

    def allocate_slots(self, request: Request, num_new_tokens: int) -> tuple[BlockId, ...] | None:
        """Make room for the next tokens; returns the blocks that are new to the request, or None.

        The first call holds the computed blocks too: `num_computed_tokens` is what ``get_computed_blocks`` said then.
        """
        number = self._numbers.get(request.request_id)
        end = request.num_computed_tokens + num_new_tokens
        try:
            if number is None:
                held: tuple[BlockId, ...] = ()
                info = self.books.allocate(
                    self._next,
                    request.all_token_ids[:end],
                    cache_salt=request.cache_salt,
                    reuse=not request.skip_reading_prefix_cache,
                )
                self._numbers[request.request_id], self._next = self._next, self._next + 1
            else:
                self.books.commit(number, upto=request.num_computed_tokens)  # of the passes before this one
                before = self.books.get_sequence(number)
                held = before.block_ids
                if before.num_tokens > request.num_computed_tokens:  # drafts that were rejected
                    held = self.books.truncate(number, request.num_computed_tokens).block_ids
                info = self.books.append(number, request.all_token_ids[request.num_computed_tokens : end])
        except OutOfMemory:
            return None
        return info.block_ids[len(held) :]

    def free(self, request: Request) -> None:
        """End a request, or preempt it: what is computed is published first."""
        if (number := self._numbers.pop(request.request_id, None)) is not None:
            tokens = self.books.get_sequence(number).num_tokens
            self.books.commit(number, upto=min(tokens, request.num_computed_tokens))
            self.books.free(number)

    def get_block_ids(self, request_id: str) -> tuple[BlockId, ...]:
        return self.books.get_sequence(self._numbers[request_id]).block_ids

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Forget blocks that nobody holds, children before their parents."""
        for block_id in sorted(block_ids, key=lambda block: -int(self.books.block(block).depth)):
            self.books.evict_block(block_id)

    def reset_prefix_cache(self) -> bool:
        if self.books.used_block_count:
            return False
        self.books.clear_prefix_cache()
        return True


def main() -> KVCacheManager:
    """A scheduler's day: two requests that share a prompt, a chunked prefill, a decode, a preemption."""
    manager, prompt = KVCacheManager(num_blocks=12, block_size=4), list(range(100, 118))
    first = Request("a", prompt)
    _, first.num_computed_tokens = manager.get_computed_blocks(first)
    for chunk in (10, 8):  # chunked prefill
        print("a: new blocks", manager.allocate_slots(first, chunk))
        first.num_computed_tokens += chunk  # the forward pass
    first.all_token_ids.append(7)
    print("a: new blocks", manager.allocate_slots(first, 1))
    first.num_computed_tokens += 1

    second = Request("b", [*prompt, 8])
    blocks, second.num_computed_tokens = manager.get_computed_blocks(second)
    print("b: shares", blocks)
    print("b: new blocks", manager.allocate_slots(second, len(second.all_token_ids) - second.num_computed_tokens))
    print(f"usage {manager.usage:.0%}")
    assert manager.allocate_slots(Request("c", list(range(40))), 40) is None  # no room: the scheduler preempts
    manager.free(second)
    manager.free(first)
    manager.evict_blocks(set(manager.get_computed_blocks(Request("d", [*prompt, 9]))[0][3:]))
    print(manager.reset_prefix_cache(), manager.books.free_block_count)
    manager.books.check()
    return manager


if __name__ == "__main__":
    main()
