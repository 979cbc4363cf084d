"""The main job: a language model distilled on real text, each way beside torch's own loss.

    python -m fastkd demo [PATH] [--preset small] [--out demo]

A BPE of 16 384, a teacher that learns from the text, and one student five times from the same
weights over the same batches: from the text alone, from the teacher by plain torch, by the fused
loss of logits, by the loss that takes the heads over, and from the teacher's outputs on disk.
"""

from . import report
from .presets import PRESETS, Net, Preset
from .run import run

__all__ = ["PRESETS", "Net", "Preset", "report", "run"]
