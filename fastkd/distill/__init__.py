"""The workflow around the losses: train, evaluate, compare and hand over a student."""

from .adversarial import adversarial
from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .combined_teachers import Peer, Several
from .datafree import batch_norm_prior, invert, train_generator
from .evaluation import Evaluation, agreement, evaluate
from .graph import neighbour_graph
from .halving import Halving, successive_halving
from .hooks import Taps, projector
from .loggers import CSVLogger, TensorBoardLogger, plot_curves
from .logging import Step
from .losses import attention, features, relations
from .losses.correlation import dist
from .losses.logits import cosine, dkd, logit_mse, nkd, response, zscore
from .losses.token_alignment import Alignment, align, align_labelled
from .losses.uld import uld, uld_loss
from .methods.export import fine_tune, hand_over
from .methods.lwf import Head, at_head, without_forgetting
from .methods.mutual import assistant_chain, mutual
from .methods.on_policy import on_policy
from .methods.self_distillation import born_again, mean_teacher, own_teacher
from .methods.student_init import copy_layers, frozen, prune, replace_head, spread
from .metrics import Report, calibration_error, latency, report
from .noise import input_noise, weight_noise
from .pseudo import PseudoLabels, pseudo_labels
from .quantise import FakeQuantise, baked, fake_quantise, quantised
from .schedules import curriculum, decay
from .serialization import load, save
from .teachers import Average, Called, Live, Stored, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train
from .tuning import Range, Search, search

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
