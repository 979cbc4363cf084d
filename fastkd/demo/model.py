"""The two language models: Llamas of transformers, whose head the loss may take over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.distill.serialization import needed

from .corpus import END, EXTRA
from .presets import Net

USER = "python -m fastkd demo"


class Language(nn.Module):
    """Tokens int64 [B, L] -> logits [B, L, V], or the `LinearLogits` of the same."""

    def __init__(self, model: Any, linear: bool) -> None:
        super().__init__()
        self.model, self.linear = model, linear

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        head = self.model.lm_head
        return fastkd.LinearLogits(hidden, head.weight) if self.linear else head(hidden)


def build(net: Net, vocab: int, context: int, seed: int) -> Any:
    """A LlamaForCausalLM with random weights; torch's own random state is kept."""
    transformers = needed("transformers", USER, EXTRA)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=net.hidden,
        intermediate_size=4 * net.hidden,
        num_hidden_layers=net.layers,
        num_attention_heads=net.heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as `AutoModelForCausalLM` and `AutoTokenizer` read them."""
    transformers = needed("transformers", USER, EXTRA)
    part = folder.with_name(f".{folder.name}.tmp")
    part.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(part)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(part)
    if not folder.exists():
        os.replace(part, folder)


def continued(model: Any, tokenizer: Any, prompt: str, tokens: int, seed: int) -> str:
    """`prompt` and `tokens` more, drawn at temperature 0.8 from the best 40."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    generator = torch.Generator().manual_seed(seed)
    language = Language(model, linear=True).eval()
    with torch.no_grad():
        for _ in range(tokens):
            outputs = language(ids[:, -model.config.max_position_embeddings :])
            last = (outputs.hidden[:, -1] @ outputs.weight.T).float().cpu()
            best, at = last.topk(min(40, last.size(-1)))
            choice = torch.multinomial(torch.softmax(best / 0.8, -1), 1, generator=generator)
            ids = torch.cat([ids, at.gather(-1, choice).to(device)], -1)
    return tokenizer.decode(ids[0].tolist())
