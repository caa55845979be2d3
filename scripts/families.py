"""Exam of every model family: each causal LM of transformers, made small, through every way to use the cache.

    python scripts/families.py [NAME …] [--output docs/families.md] [--json FILE]

A family is a model type that transformers registers for causal language modelling. It is built from its own config with
small sizes and random weights, and writes greedy text in float32. What it writes without us, through the stock cache,
is the reference; each cell of the table says whether a way gave the same tokens:

- gather: `PagedCache` under `generate()`; warm reuse: a second prompt that begins like the first, by the same cache;
- direct: attention that reads the blocks in place, ``attn_implementation="pagedkv"``;
- engine: eight prompts at once, and two of them again (reused: how many of their tokens were found cached); memory
  for fewer texts than that; the same over a disk tier, after a restart and with damaged files (tiers); prompts in
  chunks of 16 tokens; drafts looked up in the prompt; beams, against transformers' own.

Each family runs in a process of its own with a limit of time. It exits with 1 where a cell is wrong or crashed.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import pagedkv.hf
from pagedkv.errors import PagedKvError

OUTPUT = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 240
VOCAB = 97
NEW_TOKENS = 12
BLOCK = 4
LAYERS = 4
MOST_PARAMETERS = 200_000_000

# Sizes by the names that configs give them; a name that a config lacks is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "embed_dim", "rnn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "dim_ff", "dff", "lru_width"), 96),
    **dict.fromkeys(("encoder_layers",), 2),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("encoder_ffn_dim", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank",), 24),
    **dict.fromkeys(("q_lora_rank",), 32),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    "index_topk": 8,
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 12),
    "attention_chunk_size": 16,
    "query_pre_attn_scalar": 16,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_state_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 4,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "conv_dim": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "rotary_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
}
# What else a family needs to be small, found by trying.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "falcon_mamba": {"expand": 2},
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention", "mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "hidden_size": 64},
}
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers", "block_types")


def model_class(family: str) -> Any:
    name = CAUSAL[family]
    name = name if isinstance(name, str) else name[0]
    return getattr(transformers, name)


def small(config: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a config small: the sizes that it has, and lists by layer cut to the number of layers."""
    names = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    own = {name: size for name, size in SIZES.items() if name in names and _fits(_default(config, name), size)}
    if "kv_lora_rank" in own:  # latent attention: every head has its own keys, of which the rotary part is shared
        own = {name: size for name, size in own.items() if name not in ("head_dim", "num_key_value_heads")}
        own |= {"num_key_value_heads": 4} | ({"head_dim": 8} if "head_dim" in names else {})
    for name in PER_LAYER:
        kinds = _default(config, name) if name in names else None
        if isinstance(kinds, (list, tuple)) and len(kinds) > LAYERS:
            own[name] = _some_of_each(list(kinds))
    stands_for = getattr(config, "attribute_map", {})
    computed = {name for name in own if isinstance(getattr(type(config), stands_for.get(name, name), None), property)}
    own = {name: size for name, size in own.items() if name not in computed}
    return own | more


def _default(config: Any, name: str) -> Any:
    """Return a config's own value, None where it has one for each layer and says so with an error."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _fits(default: Any, size: Any) -> bool:
    """Tell whether a size can stand for a default: a list by layer or a table is left as it is."""
    return (
        default is None
        or isinstance(default, (int, float))
        and not (isinstance(default, bool) ^ isinstance(size, bool))
    )


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """Return as many kinds as there are layers, in their order, each kind at least once where there is room."""
    places = sorted({kinds.index(kind) for kind in kinds})[:LAYERS]
    rest = [place for place in range(len(kinds)) if place not in places]
    return [kinds[place] for place in sorted(places + rest[: LAYERS - len(places)])]


def small_config(family: str) -> Any:
    kind = model_class(family).config_class
    default, more = kind(), MORE.get(family, {})
    arguments = small(default, more)
    inner = getattr(default, "text_config", None)
    if inner is not None and not isinstance(inner, dict):
        text = dict(small(inner, MORE.get(inner.model_type, {})))
        if "text_config" in getattr(kind, "sub_configs", {}):
            arguments["text_config"] = text | {"model_type": inner.model_type}
    return kind(**arguments)


def build(family: str) -> Any:
    config = small_config(family)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(family)(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f} million parameters with the small sizes")
    torch.manual_seed(1)
    model = model_class(family)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random weights of the usual size write one token for ever; and what is zero at first computes nothing.
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif "bias" in name or not parameter.any():
                parameter.normal_(0, 0.02)
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=NEW_TOKENS)
    return model


def prompts(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    start = torch.randint(3, VOCAB, (20,), generator=generator).tolist()
    tails = [torch.randint(3, VOCAB, (count,), generator=generator).tolist() for count in (1, 3, 5, 9, 14, 21, 30, 37)]
    return [start + tail for tail in tails]


def is_right(model: Any, ids: list[int], got: list[int], wanted: list[int]) -> bool:
    """Tell whether a text is that of the stock cache, or of no cache: transformers' own two differ for some models."""
    return got == wanted or got == plain(model, ids, use_cache=False)


def plain(model: Any, ids: list[int], **options: Any) -> list[int]:
    """Return what a model writes through the stock cache."""
    options = {"eos_token_id": None} | options
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **options)[0].tolist()


Ways = dict[str, str]


class Refused(Exception):
    """A way that says before it writes that it does not take this model."""


def ways(family: str) -> Iterator[tuple[str, Callable[[], bool | str]]]:
    """Yield each way with a function that tells whether its tokens are those of the stock cache, or a number."""
    model = build(family)
    texts = prompts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [plain(model, ids) for ids in texts]
    cache: Any = None

    def gather() -> bool:
        nonlocal cache
        cache = pagedkv.hf.PagedCache(model.config, num_blocks=256, block_size=BLOCK)
        return is_right(model, texts[4], through(cache, model, texts[4]), wanted[4])

    def reuse() -> bool:
        if cache is None:
            raise Refused("as gather")
        return all(is_right(model, texts[5], through(cache, model, texts[5]), wanted[5]) for _ in range(2))

    def direct() -> bool:
        try:
            other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="pagedkv").eval()
        except KeyError as error:
            raise Refused(f"transformers knows no attention implementation {error} for it") from error
        other.load_state_dict(model.state_dict())
        other.generation_config = model.generation_config
        own = pagedkv.hf.PagedCache(other.config, num_blocks=256, block_size=BLOCK)
        return is_right(model, texts[4], through(own, other, texts[4]), wanted[4])

    yield "gather", gather
    yield "warm reuse", reuse
    yield "direct", direct
    yield from engine_ways(model, texts, wanted)


def through(cache: Any, model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        return pagedkv.hf.generate(model, torch.tensor([ids]), cache, eos_token_id=None)[0].tolist()


def engine_ways(
    model: Any, texts: list[list[int]], wanted: list[list[int]]
) -> Iterator[tuple[str, Callable[[], bool | str]]]:
    from pagedkv.engine import LLM, SamplingParams
    from pagedkv.tiers import DiskTier

    greedy = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}

    reused = ""

    def engine(sampling: dict[str, Any], **options: Any) -> bool:
        nonlocal reused
        llm = LLM(model, **{"num_blocks": 512, "block_size": BLOCK} | options)
        outputs = llm.generate(texts, SamplingParams(**greedy | sampling))
        again = llm.generate(texts[:2], SamplingParams(**greedy | sampling))
        written = [
            (i, texts[i] + list(done[i].outputs[0].token_ids)) for done in (outputs, again) for i in range(len(done))
        ]
        stats = llm.stats()
        reused = reused or f"{stats.prefix_hits} of {stats.prompt_tokens}"
        return all(is_right(model, texts[i], got, wanted[i]) for i, got in written)

    def tiers() -> bool | str:
        """Write with little memory over a disk tier; then again after a restart, and once more over damaged files."""
        runner = pagedkv.hf.load_runner(model, num_blocks=40, block_size=BLOCK)
        loaded: list[int] = []
        with tempfile.TemporaryDirectory() as folder:
            for begin in ("new", "restarted", "damaged"):
                if begin == "damaged":
                    _flip_bits(Path(folder) / "tier" / "slab")
                runner.cache.clear_prefix_cache()
                with LLM(runner, tiers=[DiskTier(Path(folder) / "tier", "8MB")]) as llm:
                    if not llm.stats().tiers:
                        return "without"
                    outputs = llm.generate(texts, SamplingParams(**greedy))
                    loaded.append(llm.stats().tiers[0].loads)
                written = [ids + list(done.outputs[0].token_ids) for ids, done in zip(texts, outputs, strict=True)]
                if not all(is_right(model, *each) for each in zip(texts, written, wanted, strict=True)):
                    return False
        return "equal" if loaded[1] > 0 else "nothing loaded"

    def beams() -> bool:
        ids = texts[2]
        llm = LLM(model, num_blocks=512, block_size=BLOCK)
        output = llm.generate([ids], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, beam_width=3))[0]
        got, options = ids + list(output.outputs[0].token_ids), {"num_beams": 3, "length_penalty": 1.0}
        return got == plain(model, ids, **options) or got == plain(model, ids, use_cache=False, **options)

    yield "engine", lambda: engine({})
    yield "reused", lambda: reused
    yield "tight memory", lambda: engine({}, num_blocks=40)
    yield "tiers", tiers
    yield "chunks", lambda: engine({}, max_batch_tokens=16)
    yield "lookup", lambda: engine({"prompt_lookup": 3})
    yield "beams", beams


def _flip_bits(path: Path) -> None:
    """Damage every tenth page of a file."""
    data = np.fromfile(path, np.uint8)
    data[5 :: 10 * 4096] ^= 16
    data.tofile(path)


COLUMNS = ("gather", "warm reuse", "direct", "engine", "reused", "tight memory", "tiers", "chunks", "lookup", "beams")


def sit(family: str) -> dict[str, str]:
    """Return what each way came to, by name; "build" alone where the model cannot be made, or writes nothing itself."""
    found: dict[str, str] = {}
    try:
        for name, check in ways(family):
            try:
                told = check()
                found[name] = told if isinstance(told, str) else "equal" if told else "wrong"
            except (PagedKvError, Refused) as refusal:
                found[name] = "refused: " + _line(refusal)
            except Exception as error:
                found[name] = f"crashed: {type(error).__name__}: {_line(error)}"
                if os.environ.get("TRACEBACK"):
                    traceback.print_exc()
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        found = {"build": f"{type(error).__name__}: {_line(error)}"}
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def in_own_process(family: str) -> dict[str, str]:
    """Sit the exam in a forked process: it may crash, or take too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(sit(family)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"engine": f"crashed: no answer in {SECONDS} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"engine": f"crashed: exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="NAME", help="model types (default: all)")
    parser.add_argument("--output", type=Path, help="write the table there")
    parser.add_argument("--json", type=Path, help="write the cells there; cells of families that are not named stay")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sit("llama")  # loads the kernels once, before processes are forked
    names = options.families or sorted(CAUSAL)
    begin = time.perf_counter()
    rows = json.loads(options.json.read_text()) if options.families and options.json and options.json.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for i, (family, found) in enumerate(zip(names, pool.map(in_own_process, names), strict=True), 1):
            rows[family] = found
            print(f"{i:3}/{len(names)} {family:24} {summary(found)}", flush=True)
    print(f"{totals(rows)} in {time.perf_counter() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows := dict(sorted(rows.items())), indent=1))
    if options.output:
        options.output.write_text(page(rows))
    faults = [family for family, found in rows.items() for cell in found.values() if _is_fault(cell)]
    sys.exit(1 if faults else 0)


def _is_fault(cell: str) -> bool:
    return cell in ("wrong", "nothing loaded") or cell.startswith("crashed")


def _without_names(reason: str) -> str:
    """Return a reason without the class of the model and the advice behind it, so that equal ones are one."""
    found = r"(expected one that is right over a PagedCache, got \w+: |no cache is right for \w+: )?"
    reason = re.sub(rf"^Invalid operation: \w+: {found}", "", reason)
    reason = re.sub(r", got \w+(Config|Model|CausalLM)\b", "", reason)
    reason = re.sub(r" on keys or values that are.*", " on keys or values, which are in blocks", reason)
    return re.sub(r"off by [\d.e-]+ of", "off, in relation to", reason.partition("; use")[0])


def summary(found: dict[str, str]) -> str:
    if "build" in found:
        return "not built: " + found["build"][:110]
    return ", ".join(f"{name}: {cell[:90]}" if cell != "equal" else name for name, cell in found.items())


def totals(rows: dict[str, dict[str, str]]) -> str:
    built = {family: found for family, found in rows.items() if "build" not in found}
    cells = Counter(cell.split(":")[0] for found in built.values() for name, cell in found.items() if name != "reused")
    served = sum(found.get("engine") == "equal" for found in built.values())
    return f"{len(rows)} families, {len(built)} built, {served} served by the engine; cells: " + ", ".join(
        f"{cells[kind]} {kind}" for kind in ("equal", "refused", "wrong", "crashed")
    )


def page(rows: dict[str, dict[str, str]]) -> str:
    """Return the table as Markdown; reasons stand below it, numbered."""
    reasons: dict[str, int] = {}

    def shown(cell: str | None) -> str:
        if cell is None or ": " not in cell:
            return {"equal": "=", "wrong": "**wrong**", None: "", "without": "–"}.get(cell, f"**{cell}**")
        kind, _, reason = cell.partition(": ")
        number = reasons.setdefault(_without_names(reason), len(reasons) + 1)
        return f"{'no' if kind == 'refused' else '**crashed**'} {number}"

    built = {family: found for family, found in rows.items() if "build" not in found}
    lines = [
        "# Model families",
        "",
        "Written by `python scripts/families.py --output docs/families.md` with transformers",
        f"{transformers.__version__}: every model type that it registers for causal language modelling, made small",
        "from its config, with random weights, in float32, greedy. `=`: the tokens of `generate()` with the stock",
        "cache (or, where that gives another text than the model without a cache, of either); `no`: refused before the",
        "first token, for the reason of that number; reused: tokens of the engine's prompts that were found cached;",
        "tiers: `–` where blocks alone are no prefix, so that tiers are left alone.",
        "A model type whose weights stay large is not built.",
        "",
        totals(rows) + ".",
        "",
        "| family | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    lines += [
        f"| {family} | "
        + " | ".join(found.get(name, "") if name == "reused" else shown(found.get(name)) for name in COLUMNS)
        + " |"
        for family, found in built.items()
    ]
    lines += ["", "## Why a cell says no", ""] + [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## Not built", ""] + [
        f"- {family}: {found['build']}" for family, found in rows.items() if "build" in found
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
