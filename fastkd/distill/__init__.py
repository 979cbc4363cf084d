"""The workflow around the losses: train, evaluate, compare and export a student."""

from fastkd.doctor import diagnose

from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .evaluation import Evaluation, Report, agreement, calibration_error, evaluate, latency, report
from .hooks import Hooks, projector
from .logging import CSVLogger, Step
from .losses import attention, features, relations
from .losses.correlation import dist
from .losses.logits import cosine, dkd, logit_mse, nkd, response, zscore
from .losses.token_alignment import Alignment, align, align_labelled
from .losses.uld import uld, uld_loss
from .methods.export import export, fine_tune
from .methods.lwf import Head, lwf, with_head
from .methods.mutual import assistant_chain, mutual
from .methods.on_policy import on_policy
from .methods.self_distillation import born_again, mean_teacher, self_distillation
from .methods.student_init import copy_layers, freeze, layer_map, prune, replace_head
from .noise import input_noise, weight_noise
from .schedules import curriculum, lr_schedule
from .serialization import load, save
from .teacher_ensembles import EnsembleTeacher, PeerTeacher
from .teachers import CachedTeacher, CallableTeacher, EMATeacher, ModelTeacher, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train

__all__ = [
    "Alignment",
    "Batch",
    "CSVLogger",
    "CachedTeacher",
    "CallableTeacher",
    "Checkpoints",
    "EMATeacher",
    "EnsembleTeacher",
    "Evaluation",
    "Head",
    "Hooks",
    "ModelTeacher",
    "Outputs",
    "PeerTeacher",
    "Report",
    "Step",
    "Teacher",
    "Term",
    "agreement",
    "align",
    "align_labelled",
    "assistant_chain",
    "attention",
    "born_again",
    "calibration_error",
    "copy_layers",
    "cosine",
    "curriculum",
    "diagnose",
    "dist",
    "dkd",
    "evaluate",
    "export",
    "feature",
    "features",
    "fine_tune",
    "freeze",
    "hard",
    "input_noise",
    "latency",
    "layer_map",
    "load",
    "logit_mse",
    "lr_schedule",
    "lwf",
    "mean_teacher",
    "mutual",
    "nkd",
    "on_policy",
    "projector",
    "prune",
    "relations",
    "replace_head",
    "report",
    "response",
    "save",
    "self_distillation",
    "soft",
    "train",
    "uld",
    "uld_loss",
    "weight_noise",
    "with_head",
    "zscore",
]
