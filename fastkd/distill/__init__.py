"""The workflow around the losses: train, evaluate, compare and hand over a student."""

from . import cache
from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .cohort import Peer, Several
from .evaluation import Evaluation, agreement, evaluate
from .files import load, save
from .handover import fine_tune, hand_over
from .loggers import CSVLogger, TensorBoardLogger, plot_curves
from .metrics import Report, calibration_error, latency, report
from .noise import input_noise, weight_noise
from .progress import Step
from .pseudo import PseudoLabels, pseudo_labels
from .schedules import curriculum, decay
from .schemes import assistant_chain, mutual
from .self_distill import born_again, mean_teacher, own_teacher
from .students import copy_layers, frozen, prune, replace_head, spread
from .taps import Taps, projector
from .teachers import Average, Called, Live, Stored, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train
from .tuning import Range, Search, search

__all__ = [
    "Average",
    "Batch",
    "CSVLogger",
    "Called",
    "Checkpoints",
    "Evaluation",
    "Live",
    "Outputs",
    "Peer",
    "PseudoLabels",
    "Range",
    "Report",
    "Search",
    "Several",
    "Step",
    "Stored",
    "Taps",
    "Teacher",
    "TensorBoardLogger",
    "Term",
    "agreement",
    "assistant_chain",
    "born_again",
    "cache",
    "calibration_error",
    "copy_layers",
    "curriculum",
    "decay",
    "evaluate",
    "feature",
    "fine_tune",
    "frozen",
    "hand_over",
    "hard",
    "input_noise",
    "latency",
    "load",
    "mean_teacher",
    "mutual",
    "own_teacher",
    "plot_curves",
    "projector",
    "prune",
    "pseudo_labels",
    "replace_head",
    "report",
    "save",
    "search",
    "soft",
    "spread",
    "train",
    "weight_noise",
]
