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
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from peers import PEERS, Options
from test_conventions import assert_agree, draws, each_width
from torch import Tensor

import fastkd


class Bare(ModuleType):
    """A package without what its __init__ imports; a name asked of it returns its argument."""

    def __init__(self, name: str, folders: list[str]) -> None:
        super().__init__(name)
        self.__path__ = folders

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda given, *rest, **named: given


@contextmanager
def _bare(module: str, without: tuple[str, ...]) -> Iterator[None]:
    """Stand-ins for the packages on the way to a module, and for parts that its loss can miss."""
    package, *rest = module.split(".")[:-1]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == package}
    name = package
    sys.modules[name] = Bare(name, folders)
    for part in rest:
        name, folders = f"{name}.{part}", [f"{folder}/{part}" for folder in folders]
        sys.modules[name] = Bare(name, folders)
    for name in without:
        sys.modules[name] = Bare(name, [])
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)


@cache
def peer_module(name: str, without: tuple[str, ...] = ()) -> Any:
    """The module, or a skip that names the package that is missing."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            if package == "trl":  # whose parts all want transformers: nothing stands in for that
                raise
        with _bare(name, without):
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


TIMM_WITHOUT = (
    "timm.models",
    "timm.utils",
    "timm.utils.model",
    "timm.utils.model_ema",
    "timm.loss",
)


class Given(torch.nn.Module):
    """A model of timm whose logits are there already."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.num_classes, self.in_chans = logits, logits.size(-1), 1
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def _timm(o: Options) -> Callable[..., Tensor]:
    module = peer_module("timm.task.distillation", TIMM_WITHOUT)

    def call(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        task = module.LogitDistillationTask(
            student_model=Given(s),
            teacher_model=Given(t),
            criterion=torch.nn.CrossEntropyLoss(),
            task_loss_weight=o.share,
            temperature=o.temperature,
            verbose=False,
        )
        return task(torch.zeros(len(s), 1, 1, 1), y)["loss"]

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
    for s, t, y, options in draws(peer, dtype, 5):
        assert_agree(peer, lambda s, t, y, o: make(o)(s, t, y), s, t, y, options)


OPTIONS = Options(temperature=1.0, share=0.5, beta=0.5, items=6, k=2)


@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss"])
def test_torchtune_gives_a_constant_where_no_token_counts(name: str) -> None:
    """backward() of it is an error on that rank, and a collective that the others wait in."""
    s, t = torch.randn(2, 6, 40)
    y = torch.full((6,), -100)
    loss = _torchtune(name)(OPTIONS)(s.clone().requires_grad_(), t, y)
    assert loss == 0 and not loss.requires_grad
    x = s.clone().requires_grad_()
    fastkd.kl_div(x, t, labels=y).backward()
    assert not x.grad.any()


def test_torchdistill_without_alpha_leaves_t_squared_and_beta_out() -> None:
    module = peer_module("torchdistill.losses.mid_level")
    s, t = torch.randn(2, 6, 40)
    y = torch.randint(40, (6,))
    sides = {"m": {"out": s}}, {"m": {"out": t}}
    at = ("m", "out", "m", "out")
    alone = module.KDLoss(*at, temperature=4.0, alpha=0.0, beta=7.0)(*sides, y)
    torch.testing.assert_close(alone, fastkd.kl_div(s, t, temperature=4.0))
    limit = module.KDLoss(*at, temperature=4.0, alpha=1e-9, beta=7.0)(*sides, y)
    torch.testing.assert_close(limit, alone * 16 * 7)


@pytest.mark.filterwarnings("ignore")
def test_liger_pads_a_smaller_student_with_logits_of_zero() -> None:
    """The same model with a padded head: a loss and a gradient, where ours are exactly 0."""
    logits = torch.randn(6, 40)
    head = torch.eye(40)
    padded = torch.cat((head, torch.zeros(8, 40)))
    bias = torch.cat((torch.zeros(40), torch.full((8,), -30.0)))
    y = torch.zeros(6, dtype=torch.long)
    module = peer_module("liger_kernel.chunked_loss.jsd_loss")
    loss = module.LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False)
    x = logits.clone().requires_grad_()
    value = loss(x, head, logits, padded, y, None, bias)
    value.backward()
    assert value > 1e-2 and x.grad.abs().max() > 1e-4
    x = logits.clone().requires_grad_()
    student = fastkd.LinearLogits(x, head)
    teacher = fastkd.LinearLogits(logits, padded, bias)
    value = fastkd.kl_div(student, teacher, labels=y, vocab_size=40)
    value.backward()
    assert value == 0 and not x.grad.any()
