"""generate(): model.generate() over a PagedCache that knows the token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagedkv.errors import bad_argument
from pagedkv.hf.cache import PagedCache
from pagedkv.hf.compat import require_cache_argument
from pagedkv.hf.exam import sit_cache_exam

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel, input_ids: Tensor, cache: PagedCache, *, release: bool = True, **kwargs: Any
) -> Any:
    """Generate with `model`, reusing what `cache` holds of the prompt and leaving the reply in it for the next turn.

    The cache learns the ids of every token from the forward passes themselves, so the full blocks of prompt and reply
    can be found by the next call: a second chat turn, or a second conversation with the same system prompt. The last
    token of a reply has no K and V yet and is not stored. The first call for a model lets it sit a short exam over such
    a cache (see docs/huggingface.md).

    Parameters
    ----------
    model : PreTrainedModel
        The one whose config `cache` was made with.
    input_ids : int Tensor [batch, tokens]
        The whole prompt, whatever of it is cached.
    cache : PagedCache
        It serves one model: K and V of another must not be reused. After a change of its weights (an adapter, say)
        call ``cache.manager.clear_prefix_cache()``.
    release : bool
        Whether the sequences are freed at the end; what was stored stays findable. If not, they stay until the next
        prompt or ``cache.release()``. After an error they are always freed.
    **kwargs
        For ``model.generate()``. With a tensor other than ``attention_mask`` (embeddings, positions, a list of
        images) the ids do not determine K and V, so nothing is reused or left to be found.

    Returns
    -------
    Tensor or ModelOutput
        What ``model.generate()`` returns.

    Raises
    ------
    InvalidOperation
        If `cache` is no PagedCache or has served another model, the model takes no cache or gives other logits over
        this one than over its own, there is no token, ``past_key_values`` is among the arguments, or ``use_cache`` is
        False.
    OutOfMemory
        If the pool is too small; says how many blocks it takes.
    """
    if not isinstance(cache, PagedCache):
        raise bad_argument("cache", "a PagedCache", f"{type(cache).__name__}")
    if "past_key_values" in kwargs:
        raise bad_argument("past_key_values", "the cache as third argument only")
    if isinstance(input_ids, Tensor) and not input_ids.numel() and "inputs_embeds" not in kwargs:
        raise bad_argument("input_ids", "at least one token", f"shape {list(input_ids.shape)}")
    require_cache_argument(model)
    cache.serve(model, reuses_prefixes=sit_cache_exam(model))
    others = {name for name, value in kwargs.items() if _holds_tensor(value)} - {"attention_mask"}
    if others:
        cache.reset()
        return _run(model, input_ids, cache, release, kwargs)
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _inferred_mask(model, input_ids, kwargs)
    cache.prompt(input_ids, kwargs["attention_mask"])

    def tell_ids(module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if inputs.get("past_key_values") is not cache or inputs.get("input_ids") is None:
            return None
        if inputs.get("use_cache") is False:  # every token would come again in every step, at positions of its own
            raise bad_argument("use_cache", "True with a PagedCache", "False")
        inputs = _without_cached(inputs, input_ids, cache.get_seq_length())
        cache.expect(inputs["input_ids"])
        return args, inputs

    hook = model.register_forward_pre_hook(tell_ids, with_kwargs=True)
    try:
        _read_to_snapshot(model, input_ids, kwargs["attention_mask"], cache)
        return _run(model, input_ids, cache, release, kwargs)
    finally:
        hook.remove()


def _read_to_snapshot(model: Any, input_ids: Tensor, mask: Tensor, cache: PagedCache) -> None:
    """Compute a prompt up to where a snapshot of its states is worth keeping, in a forward pass of its own."""
    past, end = cache.num_cached_tokens, cache.last_snapshot(input_ids.shape[1])
    if end <= past or not mask.all():
        return
    try:
        with torch.no_grad():
            model(input_ids=input_ids[:, past:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
    except BaseException:
        cache.release()
        raise


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensor, value)))


def _inferred_mask(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Find the padding as generate() would by itself, so that the cache and the model see the same."""
    settings = [kwargs, vars(kwargs.get("generation_config") or model.generation_config)]
    pad, eos = (
        next((given[name] for given in settings if given.get(name) is not None), None)
        for name in ("pad_token_id", "eos_token_id")
    )
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def _without_cached(inputs: dict[str, Any], prompt: Tensor, past: int) -> dict[str, Any]:
    """Cut off the tokens that are cached: assisted decoding hands the whole prompt to a warm cache."""
    ids, width = inputs["input_ids"], prompt.shape[1]
    if not past or past >= width or ids.shape[1] < width or not torch.equal(ids[:, :width], prompt.to(ids.device)):
        return inputs
    cut = {"input_ids": ids[:, past:]}
    if inputs.get("position_ids") is not None:
        cut["position_ids"] = inputs["position_ids"][..., past:]
    return inputs | cut


def _run(model: Any, input_ids: Tensor, cache: PagedCache, release: bool, kwargs: dict[str, Any]) -> Any:
    try:
        output = model.generate(input_ids, past_key_values=cache, **kwargs)
    except BaseException:
        cache.release()
        raise
    if release:
        cache.release()
    return output
