"""The peers' own functions, where their packages are installed, beside fastkd's calls.

A module of a peer is run from its file where its package does not import for want of something else
(an optional dependency of other parts of it).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from peers import PEERS, Options, Side
from test_conventions import assert_agree, draws, each_width
from torch import Tensor

import fastkd


@contextmanager
def _bare(package: str) -> Iterator[None]:
    """Packages on the way to a module without what their __init__ imports."""
    before = dict(sys.modules)
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top)
    where = list(spec.submodule_search_locations or ()) if spec else []
    name = top
    for part in ("", *rest):
        if part:
            name, where = f"{name}.{part}", [f"{path}/{part}" for path in where]
        module = ModuleType(name)
        module.__path__ = where
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == top]:
            del sys.modules[name]
        sys.modules.update({k: v for k, v in before.items() if k.split(".")[0] == top})


def peer_module(name: str) -> Any:
    """The module, or a skip that names the package that is missing."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            for loaded in [n for n in sys.modules if n.split(".")[0] == package]:
                del sys.modules[loaded]
        with _bare(name.rpartition(".")[0]):
            try:
                return importlib.import_module(name)
            except ImportError as error:
                pytest.skip(f"{package} does not import: {error}")


def _torchtune(name: str, chunks: int | None = None) -> Callable[[Options], Callable[..., Tensor]]:
    def make(o: Options) -> Callable[..., Tensor]:
        module = peer_module("torchtune.modules.loss.kd_losses")
        share = {"sym_kd_ratio": o.share} if "Symmetric" in name else {}
        if chunks is None:
            return getattr(module, name)(**share)
        loss = getattr(module, name)(num_output_chunks=chunks, **share)

        def split(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            s, t, y = s.unsqueeze(0), t.unsqueeze(0), y.unsqueeze(0)
            return loss(list(s.tensor_split(chunks, 1)), list(t.tensor_split(chunks, 1)), y)

        return split

    return make


def _liger_jsd(o: Options) -> Callable[..., Tensor]:
    module = peer_module("liger_kernel.chunked_loss.jsd_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=o.beta,
        temperature=o.temperature,
        compiled=False,
        chunk_size=2,
    )

    def call(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return loss(s, torch.eye(s.size(-1)).to(s), t, torch.eye(t.size(-1)).to(t), y)

    return call


def _torchdistill(alpha: bool) -> Callable[[Options], Callable[..., Tensor]]:
    def make(o: Options) -> Callable[..., Tensor]:
        module = peer_module("torchdistill.losses.mid_level")
        mix = {"alpha": o.share} if alpha else {"alpha": None, "beta": 1.0}
        loss = module.KDLoss("m", "out", "m", "out", temperature=o.temperature, **mix)
        return lambda s, t, y: loss({"m": {"out": s}}, {"m": {"out": t}}, y)

    return make


def _timm(o: Options) -> Callable[..., Tensor]:
    module = peer_module("timm.task.distillation")

    class Given(torch.nn.Module):
        """A model whose logits are there already."""

        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits, self.num_classes = logits, logits.size(-1)
            self.weight = torch.nn.Parameter(torch.zeros(1))  # timm asks a model for a device

        def forward(self, x: Tensor) -> Tensor:
            return self.logits

    def call(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        task = module.LogitDistillationTask(
            student_model=Given(s),
            teacher_model=Given(t),
            criterion=torch.nn.CrossEntropyLoss(),
            task_loss_weight=o.share,
            temperature=o.temperature,
            verbose=False,
        )
        return task(torch.zeros(len(s), 3, 1, 1), y)["loss"]

    return call


def _textbrewer(name: str) -> Callable[[Options], Callable[..., Tensor]]:
    def make(o: Options) -> Callable[..., Tensor]:
        loss = getattr(peer_module("textbrewer.losses"), name)
        return lambda s, t, y: loss(s, t, o.temperature)

    return make


def _modelopt(o: Options) -> Callable[..., Tensor]:
    loss = peer_module("modelopt.torch.distill.losses").LogitsDistillationLoss(o.temperature)
    return lambda s, t, y: loss(s, t)


def _trl(module: str, trainer: str) -> Callable[[Options], Callable[..., Tensor]]:
    def make(o: Options) -> Callable[..., Tensor]:
        loss = getattr(peer_module(module), trainer).generalized_jsd_loss
        return lambda s, t, y: loss(s, t, y, beta=o.beta, temperature=o.temperature)

    return make


def _trl_accumulated(o: Options) -> Callable[..., Tensor]:
    loss = peer_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    return lambda s, t, y: loss(s, t, y, beta=o.beta, num_items_in_batch=o.items)


# (entry of the table, its package's function)
INSTALLED = {
    "trl-gkd": ("TRL GKD", _trl("trl.experimental.gkd", "GKDTrainer")),
    "trl-gold": ("TRL GKD", _trl("trl.experimental.gold", "GOLDTrainer")),
    "trl-accumulated": ("TRL GKD, accumulated", _trl_accumulated),
    "torchtune-forward": ("torchtune ForwardKLLoss", _torchtune("ForwardKLLoss")),
    "torchtune-reverse": ("torchtune ReverseKLLoss", _torchtune("ReverseKLLoss")),
    "torchtune-symmetric": ("torchtune SymmetricKLLoss", _torchtune("SymmetricKLLoss")),
    "torchtune-chunked": (
        "torchtune ForwardKLLoss",
        _torchtune("ForwardKLWithChunkedOutputLoss", chunks=2),
    ),
    "torchdistill": ("torchdistill KDLoss", _torchdistill(alpha=True)),
    "torchdistill-no-alpha": ("torchdistill KDLoss, no alpha", _torchdistill(alpha=False)),
    "timm": ("timm LogitDistillationTask", _timm),
    "textbrewer-ce": ("TextBrewer kd_ce_loss", _textbrewer("kd_ce_loss")),
    "textbrewer-mse": ("TextBrewer kd_mse_loss", _textbrewer("kd_mse_loss")),
    "model-optimizer": ("Model-Optimizer", _modelopt),
    "liger-jsd": ("Liger LigerFusedLinearJSD", _liger_jsd),
}


@pytest.mark.filterwarnings("ignore")
@each_width
@pytest.mark.parametrize(("entry", "make"), INSTALLED.values(), ids=INSTALLED.keys())
def test_the_call_equals_their_function(
    entry: str, make: Callable[[Options], Callable[..., Tensor]], dtype: torch.dtype
) -> None:
    peer = PEERS[entry]

    def call(s: Tensor, t: Tensor, y: Tensor, o: Options) -> Tensor:
        return make(o)(s, t, y)

    for s, t, y, options in draws(peer, dtype, 5):
        assert_close_to_peer(call, s, t, y, options)
        assert_agree(peer, call, s, t, y, options)


def assert_close_to_peer(call: Side, s: Tensor, t: Tensor, y: Tensor, options: Options) -> None:
    """Nothing of a peer's is an excuse here that is not rounding: finite, connected, a number."""
    loss = call(s.clone().requires_grad_(), t, y, options)
    assert loss.dim() == 0 and loss.isfinite() and loss.requires_grad
