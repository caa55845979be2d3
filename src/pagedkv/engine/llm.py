"""LLM: offline generation for a list of prompts, all in one batch."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from pagedkv.control.protocol import Strategy
from pagedkv.control.types import CacheStats
from pagedkv.engine.core import EngineCore
from pagedkv.engine.offload import ladder_for
from pagedkv.engine.request import Request, RequestOutput
from pagedkv.engine.runner import Runner
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.snapshot import EngineSizes, EngineSnapshot, EngineStats
from pagedkv.errors import bad_argument
from pagedkv.machine import free_memory, give_back_unused
from pagedkv.tiers.tier import Tier
from pagedkv.typing import Dtype, Mode, Weights
from pagedkv.validate import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LONGEST_CALL = 0.2
"""Seconds that steps computed ahead may take where nobody waits for a single token: so long Ctrl-C does, too."""

# The size of the pool by default.

SHARE = 4  # of the free memory the pool takes one part in so many
LEAST = 64
MOST = 2**20
USUAL_LENGTH = 4096


def default_blocks(model: Any, block_size: int, max_num_seqs: int) -> Callable[[int], int]:
    """Return a function from the bytes of one block to the number of blocks.

    As many as `max_num_seqs` texts of the model's full length need, or a quarter of the memory that is free.
    """
    length = _longest(model) or USUAL_LENGTH
    wanted = -(-length // max(1, block_size)) * max_num_seqs
    device = getattr(model, "device", None)

    def count(bytes_per_block: int) -> int:
        affordable = free_memory(device) // (SHARE * max(1, bytes_per_block))
        return max(LEAST, min(wanted, affordable, MOST))

    return count


def default_states(model: Any, max_num_seqs: int) -> Callable[[int], int]:
    """Return a function from the bytes of one state to the number of slots.

    One for each of `max_num_seqs` texts and as many for snapshots, or an eighth of the memory that is free.
    """
    device = getattr(model, "device", None)
    return lambda size: max(2, min(2 * max_num_seqs, free_memory(device) // (2 * SHARE * max(1, size))))


def _longest(model: Any) -> int | None:
    if isinstance(model, (str, PathLike)):
        config: Any
        try:
            config = json.loads((Path(model) / "config.json").read_text())
        except (OSError, ValueError):
            return None
        limit = config.get("max_position_embeddings") if isinstance(config, dict) else None
    else:
        config = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


Prompt = str | Sequence[int]


class RequestOptions(TypedDict, total=False):
    """What :class:`Request` takes besides a prompt and parameters."""

    priority: int
    cache_salt: str
    session_id: str | None
    tenant: str
    wants_updates: bool
    arrived: float


class LLM:
    """A language model behind a continuous batching engine.

    Parameters
    ----------
    model : str, path, PreTrainedModel or runner
        A folder in the Hugging Face format, a causal language model of transformers, or a
        :class:`pagedkv.hf.runner.ModelRunner`, which brings its cache.
    tokenizer : str, path or tokenizer, optional
        That of the folder by default; without one prompts are token ids and outputs have no text.
    num_blocks : int or callable, optional
        Size of the pool, or a function from the bytes of one block to it. By default what ``max_num_seqs`` texts of
        full length need, or a quarter of the memory that is free, if that is less.
    block_size : int
        Tokens of a block.
    max_batch_tokens : int
        Most tokens that go through the model in a step, but that every text which is being written gets its next one.
    max_num_seqs : int
        Most texts that are written at once.
    strategy : str or EvictionStrategy
        Which cached blocks are reclaimed first, and which running texts preempted.
    prefix_caching : bool
        Whether the K and V of equal prefixes are used again.
    eviction_threshold : float
        As of :class:`pagedkv.PagedKvCache`.
    kv_dtype : str or torch.dtype, optional
        Of the stored K and V; that of the model by default. ``"int8"`` and ``"fp8"`` are quantised.
    mode : {"auto", "compiled", "ragged", "gather"}
        How the model is run; see :func:`pagedkv.hf.load_runner`.
    num_states : int, optional
        Slots for the states of recurrent layers, as of :func:`pagedkv.hf.load_runner`. By default two for each of
        ``max_num_seqs`` texts, or an eighth of the memory that is free, if that is less.
    cuda_graphs : bool, optional
        Whether decode steps are replayed as CUDA graphs; as of :func:`pagedkv.hf.load_runner`, too.
    weights : {"int8"}, optional
        What the weights are quantised to; as of :func:`pagedkv.hf.load_runner`, too.
    keep_model : bool
        Whether a model that was given keeps its weights and can run by itself; as of :func:`pagedkv.hf.load_runner`.
    tenant_weights : mapping, optional
        Tenants to their parts of what is computed and held, in proportion; 1 for those that are not in it.
    tiers : sequence of Tier
        Where K and V are kept beyond the pool, nearest first: ``[DiskTier("chats", "50GB")]``. They are opened for this
        model and closed with :meth:`close`; one that is open already is closed by whoever opened it. Models whose
        prefixes cannot be reused by blocks alone go without, with a line in the log.

    Attributes
    ----------
    core : EngineCore
    tokenizer
        None if there is none.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | Runner,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        num_blocks: int | Callable[[int], int] | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_num_seqs: int = 256,
        strategy: Strategy = "lru",
        prefix_caching: bool = True,
        eviction_threshold: float = 0.9,
        kv_dtype: Dtype | None = None,
        mode: Mode = "auto",
        num_states: int | None = None,
        cuda_graphs: bool | None = None,
        weights: Weights | None = None,
        keep_model: bool = True,
        tenant_weights: Mapping[str, float] | None = None,
        tiers: Sequence[Tier] = (),
    ) -> None:
        if hasattr(model, "forward") and hasattr(model, "cache"):
            runner = cast("Runner", model)
        else:
            from pagedkv.hf.load import load_runner

            runner = load_runner(
                cast("str | PathLike[str] | PreTrainedModel", model),
                num_blocks=default_blocks(model, block_size, max_num_seqs) if num_blocks is None else num_blocks,
                block_size=block_size,
                strategy=strategy,
                prefix_caching=prefix_caching,
                kv_dtype=kv_dtype,
                mode=mode,
                eviction_threshold=eviction_threshold,
                num_states=default_states(model, max_num_seqs) if num_states is None else num_states,
                cuda_graphs=cuda_graphs,
                weights=weights,
                keep_model=keep_model,
            )
        self.tokenizer = _tokenizer_of(model if tokenizer is None else tokenizer)
        self.core = EngineCore(
            runner,
            tokenizer=self.tokenizer,
            eos_token_ids=_eos_of(runner),
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            tenant_weights=tenant_weights,
            ladder=ladder_for(runner, tiers),
        )
        self._numbers = itertools.count()
        self._turn = threading.Lock()
        give_back_unused()  # the exam, kernels and a tokenizer were loaded: some 80 MiB

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Write a continuation of every prompt; threads that call at once take turns.

        Parameters
        ----------
        prompts : str, list of int, or a list of these
            Texts, or token ids.
        params : SamplingParams, or one for each prompt
            The defaults by default.
        priority : int
            Matters among requests that are under way at the same time.
        cache_salt : str
            Calls of different salts never share a block.
        progress : bool
            Show a progress bar.

        Returns
        -------
        list of RequestOutput
            In the order of the prompts.

        Raises
        ------
        InvalidOperation
            If an argument makes no sense.
        RequestRefused
            If a request can never fit, with the numbers; none is computed then.
        """
        listed = _listed(prompts)
        wanted = _one_each(params, len(listed))
        requests = [
            self.request(prompt, each, priority=priority, cache_salt=cache_salt, wants_updates=False)
            for prompt, each in zip(listed, wanted, strict=True)
        ]
        with self._turn:
            return self._outputs_of(requests, progress)

    def _outputs_of(self, requests: Sequence[Request], progress: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self.core.add(request)
            with _progress_bar(len(requests)) if progress else nullcontext(lambda: None) as advance:
                while len(done) < len(requests):
                    self.core.wait()
                    for output in self.core.step(LONGEST_CALL):
                        done[output.request_id] = output
                        advance()
        except BaseException:
            for request in requests:
                self.core.abort(request.request_id)
            raise
        return [done[request.request_id] for request in requests]

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Return a request for ``core.add``; `options` are those of :class:`Request`."""
        return Request(
            request_id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt_token_ids=self.encode(prompt) if isinstance(prompt, str) else prompt,
            prompt=prompt if isinstance(prompt, str) else None,
            params=SamplingParams() if params is None else params,
            **options,
        )

    @property
    def sizes(self) -> EngineSizes:
        """Of the pool, the model and the batch: what never changes."""
        return self.core.sizes

    def stats(self) -> EngineStats:
        """Return the counters since the engine was made, or reset."""
        return self.core.stats()

    def cache_stats(self) -> CacheStats:
        """Return the counters of the cache since it was made."""
        return self.core.cache_stats()

    def snapshot(self) -> EngineSnapshot:
        """Return pool, requests and counters at this moment, frozen."""
        return self.core.snapshot()

    def clear_prefix_cache(self) -> int:
        """Forget all prefixes, in tiers too; returns how many blocks became free. What runs goes on."""
        return self.core.clear_prefix_cache()

    def reset(self) -> int:
        """Forget all prefixes and count from zero again; returns how many blocks became free.

        Raises
        ------
        InvalidOperation
            If requests are under way.
        """
        return self.core.reset()

    def pin(self, prompt: Prompt, *, cache_salt: str = "") -> int:
        """Keep the whole blocks of a text in the pool for the texts that begin with it, until all is forgotten.

        They are brought from tiers or computed.

        Parameters
        ----------
        prompt : str or list of int
        cache_salt : str
            Of the texts that are to find it.

        Returns
        -------
        int
            How many tokens of it are pinned: 0 where prefixes are not reused.

        Raises
        ------
        RequestRefused
            If it is too long.
        OutOfMemory
            If there is no room.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.generate([ids], SamplingParams(max_tokens=1, ignore_eos=True), cache_salt=cache_salt)
        size = self.sizes.block_size
        with self._turn:
            return self.core.pin(ids[: len(ids) // size * size], cache_salt).num_tokens

    def warm_up(self) -> None:
        """Compute a few tokens, so that kernels are compiled and the pool has its memory; then `reset`, tiers aside."""
        pool = self.sizes.total_blocks * self.sizes.block_size
        with self.core.without_tiers():
            self.generate([0] * max(1, min(8, pool - 2)), SamplingParams(max_tokens=2, ignore_eos=True))
            self.reset()

    def close(self) -> None:
        """Finish what is under way between pool and tiers, and close those opened here; a second call does nothing.

        Raises
        ------
        TierError
            If the medium of a tier refuses; all are closed.
        """
        self.core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer puts around it.

        Raises
        ------
        InvalidOperation
            If there is no tokenizer.
        """
        if self.tokenizer is None:
            hint = "LLM(model, tokenizer) takes texts"
            raise bad_argument("prompts", "token ids, as the engine has no tokenizer", "a str", hint)
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[], None]]:
    """Show how many of `total` requests are done; yields what counts one more."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise bad_argument("prompts", "texts or lists of token ids", shown(prompts), "write [[1, 2, 3]]") from None
    return [listed] if listed and not isinstance(listed[0], str) and not hasattr(listed[0], "__len__") else listed


def _one_each(params: Any, count: int) -> list[Any]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Mapping) or not isinstance(params, Sequence):
        raise bad_argument("params", "SamplingParams, or a list of them", shown(params), "write SamplingParams(…)")
    if len(params) != count:
        hint = "one alone is for all prompts"
        raise bad_argument("params", f"one SamplingParams for each of {count} prompts", f"{len(params)}", hint)
    return list(params)


def _tokenizer_of(source: Any) -> Any:
    """Return a tokenizer, loaded where a folder is given that has one."""
    if not isinstance(source, (str, PathLike)):
        return source if callable(getattr(source, "decode", None)) else None
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _eos_of(runner: Any) -> list[int]:
    model = getattr(runner, "model", None)
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return [int(eos)] if isinstance(eos, int) else [int(token) for token in eos]
    return []
