"""Models that the tests of the command make of the shipped one: a folder with a chat template, a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedkv.models import shipped_model_path

TEMPLATE = """\
{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no system') }}
{% endif %}# {{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"""


def chat_folder(target: Path) -> Path:
    """Copy the shipped model, with a chat template that refuses the system message "no"."""
    folder = Path(shutil.copytree(shipped_model_path(), target))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(target: Path) -> None:
    """Write the shipped model as a GGUF file in float32."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), local_files_only=True).float()
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path(), local_files_only=True)
    config, writer = model.config, gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    told = json.loads((shipped_model_path() / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in told["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # it is the embedding
        found = names.get_name(name, try_suffixes=(".weight",))
        if ".q_proj." in name or ".k_proj." in name:  # GGUF pairs the two halves of a head
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(found, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
