"""The workflow around the losses: train, evaluate, compare and hand over a student."""

from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .evaluation import Evaluation, agreement, evaluate
from .files import load, save
from .noise import input_noise, weight_noise
from .progress import Step
from .taps import Taps, projector
from .teachers import Average, Called, Live, Peer, Several, Stored, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train

__all__ = [
    "Average",
    "Batch",
    "Called",
    "Checkpoints",
    "Evaluation",
    "Live",
    "Outputs",
    "Peer",
    "Several",
    "Step",
    "Stored",
    "Taps",
    "Teacher",
    "Term",
    "agreement",
    "evaluate",
    "feature",
    "hard",
    "input_noise",
    "load",
    "projector",
    "save",
    "soft",
    "train",
    "weight_noise",
]
