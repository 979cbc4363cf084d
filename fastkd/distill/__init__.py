"""The workflow around the losses: train, evaluate, compare and hand over a student."""

from . import attention, cache, features, relations
from .adversarial import adversarial
from .align import Alignment, align, align_labelled
from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .cohort import Peer, Several
from .correlation import dist
from .datafree import batch_norm_prior, invert, train_generator
from .evaluation import Evaluation, agreement, evaluate
from .files import load, save
from .graph import neighbour_graph
from .halving import Halving, successive_halving
from .handover import fine_tune, hand_over
from .lifelong import Head, at_head, without_forgetting
from .loggers import CSVLogger, TensorBoardLogger, plot_curves
from .metrics import Report, calibration_error, latency, report
from .noise import input_noise, weight_noise
from .on_policy import on_policy
from .progress import Step
from .pseudo import PseudoLabels, pseudo_labels
from .quantise import FakeQuantise, baked, fake_quantise, quantised
from .responses import cosine, dkd, logit_mse, nkd, response, zscore
from .schedules import curriculum, decay
from .schemes import assistant_chain, mutual
from .self_distill import born_again, mean_teacher, own_teacher
from .students import copy_layers, frozen, prune, replace_head, spread
from .taps import Taps, projector
from .teachers import Average, Called, Live, Stored, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train
from .tuning import Range, Search, search
from .uld import uld, uld_loss

__all__ = [
    "Alignment",
    "Average",
    "Batch",
    "CSVLogger",
    "Called",
    "Checkpoints",
    "Evaluation",
    "FakeQuantise",
    "Halving",
    "Head",
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
    "adversarial",
    "agreement",
    "align",
    "align_labelled",
    "assistant_chain",
    "at_head",
    "attention",
    "baked",
    "batch_norm_prior",
    "born_again",
    "cache",
    "calibration_error",
    "copy_layers",
    "cosine",
    "curriculum",
    "decay",
    "dist",
    "dkd",
    "evaluate",
    "fake_quantise",
    "feature",
    "features",
    "fine_tune",
    "frozen",
    "hand_over",
    "hard",
    "input_noise",
    "invert",
    "latency",
    "load",
    "logit_mse",
    "mean_teacher",
    "mutual",
    "neighbour_graph",
    "nkd",
    "on_policy",
    "own_teacher",
    "plot_curves",
    "projector",
    "prune",
    "pseudo_labels",
    "quantised",
    "relations",
    "replace_head",
    "report",
    "response",
    "save",
    "search",
    "soft",
    "spread",
    "successive_halving",
    "train",
    "train_generator",
    "uld",
    "uld_loss",
    "weight_noise",
    "without_forgetting",
    "zscore",
]
