"""A Llama of transformers as a file that llama.cpp reads: float32, a vocabulary of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, model: Any, tokenizer: Any, *, end: int) -> None:
    """Write the model; `end` is the id that ends a text."""
    import gguf

    config = model.config
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_file_type(0)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    for add in (out.add_key_length, out.add_value_length, out.add_rope_dimension_count):
        add(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    kind, ids = gguf.TokenType, range(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list([texts.get(i, f"<{i}>") for i in ids])
    out.add_token_types([kind.NORMAL if i in texts else kind.UNUSED for i in ids])
    out.add_token_merges(["\u0120 \u0120"])  # there must be one
    out.add_eos_token_id(end)
    out.add_add_bos_token(False)
    for name, x in model.state_dict().items():
        own = name.removesuffix(".weight")
        if own.startswith("model.layers."):
            _, _, layer, rest = own.split(".", 3)
            own = f"blk.{layer}.{NAMES[rest]}"
        else:
            own = NAMES[own]
        if own.endswith(("attn_q", "attn_k")):  # rotated in neighbours there, in halves here
            x = x.view(-1, 2, config.head_dim // 2, x.size(-1)).transpose(1, 2).reshape(x.shape)
        out.add_tensor(f"{own}.weight", x.to(torch.float32).contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
