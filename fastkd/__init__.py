"""fastkd: fused knowledge-distillation losses for PyTorch, one pass over the logits."""

from fastkd import nn
from fastkd.backends.choice import use_backend
from fastkd.binary import (
    binary_distillation_loss,
    binary_js_div,
    binary_kl_div,
    binary_reverse_kl_div,
)
from fastkd.divergence import divergences
from fastkd.engine.outputs import LossOutputs
from fastkd.engine.reduction import checked
from fastkd.info import __version__, info
from fastkd.losses import (
    acceptance_loss,
    distillation_loss,
    js_div,
    kl_div,
    reverse_kl_div,
    skew_kl_div,
    skew_reverse_kl_div,
    tv_distance,
)
from fastkd.mapped import MappedLogits
from fastkd.operands import LinearLogits, TopK
from fastkd.parallel.layout import token_count
from fastkd.topk import topk_from_logits

__all__ = [
    "LinearLogits",
    "LossOutputs",
    "MappedLogits",
    "TopK",
    "__version__",
    "acceptance_loss",
    "binary_distillation_loss",
    "binary_js_div",
    "binary_kl_div",
    "binary_reverse_kl_div",
    "checked",
    "distillation_loss",
    "divergences",
    "info",
    "js_div",
    "kl_div",
    "nn",
    "reverse_kl_div",
    "skew_kl_div",
    "skew_reverse_kl_div",
    "token_count",
    "topk_from_logits",
    "tv_distance",
    "use_backend",
]
