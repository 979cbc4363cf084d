"""The models' figures on held-out text."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from fastkd.distill.logging import progress_bar

from .corpus import in_order
from .model import Language, continued
from .stages import HARD, LINEAR, TEACHER, Stages, hard_loss


@torch.no_grad()
def evaluate(stages: Stages, models: dict[str, Any]) -> dict[str, dict[str, float]]:
    """name -> "nats" a token and "agreement", the share of tokens where the best is the teacher's.

    Args:
        stages: the run.
        models: by name, the teacher's among them.
    """
    preset = stages.preset
    samples = in_order(stages.corpus.held_out, preset.context, preset.held_out)
    languages = {name: Language(model, linear=True).eval() for name, model in models.items()}
    totals = {name: [0.0, 0.0] for name in models}
    count = 0
    loader = DataLoader(samples, batch_size=preset.student.batch)
    for batch in progress_bar(stages.progress, loader, unit="batch"):
        tokens, labels = (x.to(stages.device) for x in batch)
        count += labels.numel()
        best = {}
        for name, language in languages.items():
            outputs = language(tokens)
            totals[name][0] += hard_loss(outputs, None, labels).item() * labels.numel()
            best[name] = (outputs.hidden @ outputs.weight.T).argmax(-1)
        for name in models:
            totals[name][1] += (best[name] == best[TEACHER]).sum().item()
    return {
        name: {"nats": nats / count, "agreement": same / count}
        for name, (nats, same) in totals.items()
    }


def samples(stages: Stages, models: dict[str, Any], tokens: int = 48) -> dict[str, str]:
    """Held-out text that was begun, and what the models make of it."""
    text = stages.corpus.held_out
    at = len(text) // 3
    begun = stages.corpus.tokenizer.decode(text[at : at + 24].tolist())
    shown_texts = {"the text": begun}
    for name in (TEACHER, LINEAR, HARD):
        continuation = continued(models[name], stages.corpus.tokenizer, begun, tokens, stages.seed)
        shown_texts[name] = continuation[len(begun) :]
    return shown_texts
