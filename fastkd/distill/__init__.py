"""The workflow around the losses: train, evaluate, compare and export a student."""

from .batch import Batch, Outputs
from .checkpoint import Checkpoints
from .diagnosis import diagnose
from .evaluation import Evaluation, Report, agreement, calibration_error, evaluate, latency, report
from .hooks import Hooks, projector
from .logging import CSVLogger, Step
from .losses import attention, features, relations
from .losses.binary import binary_hard, binary_soft
from .losses.correlation import dist
from .losses.dense import channel_wise, pixel_wise
from .losses.embeddings import embedding, embedding_loss, in_batch_similarity
from .losses.logits import cosine, dkd, logit_mse, nkd, response, zscore
from .losses.ranking import listwise_loss, margin_mse, ranking
from .losses.regression import bounded_regression_loss, regression, regression_loss
from .losses.sampled import sampled_reverse_kl
from .losses.token_alignment import Alignment, align, align_labelled
from .losses.uld import uld, uld_loss
from .methods.export import export, fine_tune
from .methods.lwf import Head, lwf, with_head
from .methods.mutual import assistant_chain, mutual
from .methods.on_policy import on_policy
from .methods.self_distillation import born_again, mean_teacher, self_distillation
from .methods.student_init import copy_layers, freeze, layer_map, prune, replace_head
from .noise import input_noise, weight_noise
from .prompted_teacher import PromptedTeacher
from .schedules import curriculum, lr_schedule
from .self_teachers import BaseTeacher
from .serialization import load, save
from .teacher_ensembles import EnsembleTeacher, PeerTeacher
from .teacher_routes import RoutedTeacher
from .teachers import CachedTeacher, CallableTeacher, EMATeacher, ModelTeacher, Teacher
from .terms import Term, feature, hard, soft
from .trainer import train

__all__ = [
    "Alignment",
    "BaseTeacher",
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
    "PromptedTeacher",
    "Report",
    "RoutedTeacher",
    "Step",
    "Teacher",
    "Term",
    "agreement",
    "align",
    "align_labelled",
    "assistant_chain",
    "attention",
    "binary_hard",
    "binary_soft",
    "born_again",
    "bounded_regression_loss",
    "calibration_error",
    "channel_wise",
    "copy_layers",
    "cosine",
    "curriculum",
    "diagnose",
    "dist",
    "dkd",
    "embedding",
    "embedding_loss",
    "evaluate",
    "export",
    "feature",
    "features",
    "fine_tune",
    "freeze",
    "hard",
    "in_batch_similarity",
    "input_noise",
    "latency",
    "layer_map",
    "listwise_loss",
    "load",
    "logit_mse",
    "lr_schedule",
    "lwf",
    "margin_mse",
    "mean_teacher",
    "mutual",
    "nkd",
    "on_policy",
    "pixel_wise",
    "projector",
    "prune",
    "ranking",
    "regression",
    "regression_loss",
    "relations",
    "replace_head",
    "report",
    "response",
    "sampled_reverse_kl",
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
