"""A causal language model's hidden states on disk, and a Trainer that learns from them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from causal_models import (
    LOSS,
    VOCAB,
    curve,
    llama,
    loss_of,
    make,
    ragged,
    run,
    together,
    trainer_of,
)
from torch import nn
from torch.utils.data import DataLoader

from fastkd.teachers import store


@pytest.mark.parametrize("family", ["Gemma2", "Cohere"])  # a softcap, a scale
def test_the_loss_of_what_is_stored(tmp_path: Path, family: str) -> None:
    teacher, student, data = make(family, 1), llama(), ragged(5)
    teacher.train()
    loader = DataLoader(data, 2, collate_fn=together)
    store.capture(teacher, loader, tmp_path, hidden=True, labels="input_ids", progress=False)
    assert teacher.training and not teacher.get_output_embeddings()._forward_pre_hooks
    reader = store.Reader(tmp_path, vocab_size=VOCAB)
    batch = store.collate([store.Paired(data, reader)[i] for i in range(5)])
    expected = loss_of(student, teacher, together(data))
    torch.testing.assert_close(loss_of(student, None, batch), expected, rtol=1e-5, atol=1e-6)
    dense = loss_of(student, None, batch, linear=False)
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-6)


def test_a_trainer_learns_from_it(tmp_path: Path) -> None:
    teacher, data, args = llama(9), ragged(), {"max_steps": 3, "gradient_accumulation_steps": 2}
    loader = DataLoader(data, 3, collate_fn=together)
    store.capture(teacher, loader, tmp_path / "a", hidden=True, labels="input_ids", progress=False)
    pairs = store.Paired(data, store.Reader(tmp_path / "a", vocab_size=VOCAB))
    padded = functools.partial(store.collate, pad=0)
    more = {"remove_unused_columns": False, **args}
    stored = trainer_of(
        tmp_path, llama(), None, args=more, train_dataset=pairs, data_collator=padded
    )
    live = trainer_of(tmp_path, llama(), llama(9), args=args)
    assert curve(run(stored)) == pytest.approx(curve(run(live)), rel=1e-4)
    assert LOSS["temperature"] != 1.0  # none of the store's


def test_a_model_without_a_head_to_read(tmp_path: Path) -> None:
    broken = llama()
    broken.set_output_embeddings(nn.Sequential(broken.get_output_embeddings()))
    loader = DataLoader(ragged(2), 2, collate_fn=together)
    with pytest.raises(TypeError, match=r"hidden: got True for .*LlamaForCausalLM.*k=, its"):
        store.capture(broken, loader, tmp_path, hidden=True, labels="input_ids", progress=False)
    assert not list(tmp_path.iterdir())
