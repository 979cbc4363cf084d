"""The workflow around the losses: train, evaluate, compare and hand over a student."""

from .trainer import Evaluation, Step, agreement, evaluate, load, save, train

__all__ = ["Evaluation", "Step", "agreement", "evaluate", "load", "save", "train"]
