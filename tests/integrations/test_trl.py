"""TRL's losses and ours, on the inputs of TRL's own tests and beyond; TRL's trainers with ours."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import os
import tempfile
from typing import Any

import pytest
import torch
from common import INF
from oracle import assert_gradients, assert_values
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd.integrations import trl as fused

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

LABELS = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
each_beta = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def trl(name: str) -> Any:
    # one that is installed and does not import is a failure: nothing here would be tested
    pytest.importorskip("trl", minversion="1.0")
    return importlib.import_module(f"trl.experimental.{name}")


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    s, t = torch.randn(2, *shape, dtype=dtype)
    return s, t


def both(loss: Any, s: Tensor, t: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    x = s.detach().requires_grad_()
    value = loss(x, t, *args, **options)
    weight = torch.linspace(1, 2, value.numel(), dtype=s.dtype).view_as(value)
    (grad,) = torch.autograd.grad(value, x, weight)
    return value.detach(), grad


def assert_equal(theirs: Any, s: Tensor, t: Tensor, *args: Any, **options: Any) -> None:
    """The tolerance rule, with their own loss in float64 as the truth."""
    mine = both(fused.generalized_jsd_loss, s, t, *args, **options)
    its = both(theirs, s, t, *args, **options)
    exact = both(theirs, s.double(), t.double(), *args, **options)
    assert mine[0].shape == its[0].shape
    assert_values(mine[0], its[0], exact[0])
    assert_gradients(mine[1], its[1], exact[1])


@pairwise
@each_dtype
@each_beta
@pytest.mark.parametrize("reduction", fused.REDUCTIONS)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "masked"])
def test_gkd(reduction: str, labels: Tensor | None, beta: float, dtype: torch.dtype) -> None:
    theirs = trl("gkd").GKDTrainer.generalized_jsd_loss
    s, t = pair(2, 3, 5, dtype=dtype)
    for temperature in (1.0, 0.5, 4):
        assert_equal(theirs, s, t, labels, beta, temperature, reduction)
    for items in (7, torch.tensor(5)):
        assert_equal(theirs, s, t, labels, beta, 1.0, reduction, items)


def test_the_arguments_are_gkd_s_in_its_order() -> None:
    theirs = inspect.signature(trl("gkd").GKDTrainer.generalized_jsd_loss).parameters
    ours = inspect.signature(fused.generalized_jsd_loss).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    rest = list(ours.values())[len(theirs) :]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)


def test_what_gkd_s_own_tests_say() -> None:
    loss = fused.generalized_jsd_loss
    s, t = pair(2, 3, 5)
    uniform = torch.ones(1, 1, 10)
    assert loss(uniform, uniform) == 0 and abs(loss(s, s)) < 1e-15
    torch.testing.assert_close(loss(s, t, beta=0.1), loss(t, s, beta=0.9))
    p, q = t.log_softmax(-1), s.log_softmax(-1)
    kl = torch.nn.functional.kl_div
    forward = kl(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss(s, t, beta=0), forward)
    backward = kl(p, q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss(s, t, beta=1), backward)
    assert loss(s, t, temperature=2) < loss(s, t, temperature=1)
    for reduction, shape in (("batchmean", ()), ("mean", ()), ("sum", ()), ("none", (2, 3, 5))):
        assert loss(s, t, reduction=reduction).shape == shape
    torch.testing.assert_close(loss(s, t, LABELS), loss(s, t, LABELS, reduction="sum") / 3)
    x = s.clone().requires_grad_()
    nothing = loss(x, t, torch.full((2, 3), -100))
    nothing.backward()
    assert nothing == 0 and not x.grad.any()


@each_dtype
@each_beta
def test_gold_of_probabilities(beta: float, dtype: torch.dtype) -> None:
    """Of matched tokens alone: they do not sum to 1, and some are below the floor."""
    theirs = trl("gold").GOLDTrainer.generalized_jsd_loss
    s, t = (3 * x for x in pair(4, 9, dtype=dtype))
    s[0, 0] = s[1, 1] = -INF
    s, t = s.softmax(-1)[:, :6], t.softmax(-1)[:, :6]
    for reduction in fused.REDUCTIONS:
        assert_equal(theirs, s, t, beta=beta, reduction=reduction, logits_are_probs=True)


@each_beta
@pytest.mark.parametrize("add_tail", [True, False])
def test_iw_opd_of_top_columns(add_tail: bool, beta: float) -> None:
    theirs = trl("iw_opd").IWOPDTrainer.generalized_jsd_loss
    s, t = (2 * x for x in pair(2, 3, 50))
    for k in (1, 6, 50, 60):
        if k == 1 and not add_tail and beta in (0, 1):
            continue  # one column alone, renormalised: 0 by their formula and ours, and no gradient
        options: dict[str, Any] = {"beta": beta, "top_k": k, "add_tail": add_tail}
        for rows in ({}, {"labels": LABELS}, {"labels": LABELS, "num_items_in_batch": 7}):
            mine = both(fused.generalized_jsd_loss, s, t, temperature=1.5, **rows, **options)
            its = both(theirs, s, t, temperature=1.5, **rows, **options)
            # their tail is a difference of a sum from 1
            torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-9)


def test_minillm_s_regulariser() -> None:
    """By its definition, and its gradient as it reaches the logits."""
    s, t = pair(2, 3, 5)
    mask = LABELS != -100

    def theirs(x: Tensor) -> Tensor:
        log_p, log_q = t.log_softmax(-1), x.log_softmax(-1)
        cells = log_q.exp() * (log_q - log_p)
        return cells[mask].sum() / mask.sum()

    def ours(x: Tensor) -> Tensor:
        log_p, log_q = t.log_softmax(-1), x.log_softmax(-1)
        return fused.single_step_decomposition_loss(log_q, log_p, mask)

    x = s.clone().requires_grad_()
    torch.testing.assert_close(ours(s), theirs(s))
    for one, other in zip(*(torch.autograd.grad(f(x), x) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_that_are_never_built() -> None:
    hidden, weight, t = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 3, 5)
    loss = fused.generalized_jsd_loss(fastkd.LinearLogits(hidden, weight), t, LABELS)
    torch.testing.assert_close(loss, fused.generalized_jsd_loss(hidden @ weight.T, t, LABELS))


# ---- a trainer's step


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "<pad> <eos> <unk> user assistant : what is the cat a dog small".split()
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return made


def language_model(vocab: int, width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **heads, **ends))


def trained(trainer: type, config: type, lmbda: float) -> tuple[list[float], Tensor]:
    from datasets import Dataset

    words = tokenizer()
    asked = {"role": "user", "content": "what is the cat"}
    answers = ("a small dog", "the cat is small", "a", "is a cat")
    said = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            folder,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lmbda=lmbda,
            max_new_tokens=3,
            learning_rate=1e-2,
            max_length=32,
            seed=3,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        run = trainer(
            model=language_model(len(words), 16, seed=0),
            teacher_model=language_model(len(words), 32, seed=1),
            args=arguments,
            train_dataset=Dataset.from_list([{"messages": messages} for messages in said]),
            processing_class=words,
        )
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["dataset", "on-policy"])
def test_gkd_trains_alike_with_and_without(lmbda: float) -> None:
    gkd = trl("gkd")

    class Fused(gkd.GKDTrainer):
        pass

    class ByHand(gkd.GKDTrainer):
        generalized_jsd_loss = staticmethod(fused.generalized_jsd_loss)

    fused.patch(Fused, inplace=True)
    assert gkd.GKDTrainer.generalized_jsd_loss is not fused.generalized_jsd_loss
    theirs, weights = trained(gkd.GKDTrainer, gkd.GKDConfig, lmbda)
    assert len(theirs) == 2 and min(theirs) > 1e-3
    for trainer in (Fused, ByHand):
        ours, own = trained(trainer, gkd.GKDConfig, lmbda)
        assert ours == pytest.approx(theirs, rel=1e-4)
        # Adam turns a gradient of rounding into one of its size; few parameters have such
        assert float((own - weights).abs().mean()) < 1e-6


# ---- what fits, and what does not


def test_every_trainer_that_has_the_loss_takes_ours() -> None:
    for name, trainer in (("gkd", "GKD"), ("gold", "GOLD"), ("iw_opd", "IWOPD")):
        cls = getattr(trl(name), f"{trainer}Trainer")
        derived = fused.patch(type("Derived", (cls,), {}))
        assert derived.generalized_jsd_loss is fused.generalized_jsd_loss
        assert cls.generalized_jsd_loss is not fused.generalized_jsd_loss


class Unknown:
    @staticmethod
    def generalized_jsd_loss(student_logits: Any, teacher_logits: Any, gamma: float = 1.0) -> None:
        raise NotImplementedError


class MiniLLM:
    def _single_step_decomposition_loss(self, student_log_probs: Any, mask: Any = None) -> None:
        raise NotImplementedError


def test_patch_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "check_version", lambda: None)
    with pytest.raises(TypeError, match=r"Unknown\.generalized_jsd_loss takes gamma"):
        fused.patch(Unknown)
    with pytest.raises(TypeError, match="got dict, which has none of"):
        fused.patch(dict)
    one = fused.patch(MiniLLM())
    s, t = pair(2, 5)
    assert one._single_step_decomposition_loss(s, t) > 0


@pytest.mark.parametrize("version", ["0.29.1", "2.0.0.dev0", "3.1"])
def test_a_version_out_of_range(version: str) -> None:
    with pytest.raises(ImportError, match=f"trl: got {version}, expected trl >=1.0, <2.0"):
        fused.check_version(version)


def test_versions_in_range() -> None:
    for version in ("1.0.0", "1.16.0", "1.17.0.dev0"):
        fused.check_version(version)
    if importlib.util.find_spec("trl") is None:
        with pytest.raises(ImportError, match=r"trl needs trl: pip install .*; expected trl >=1.0"):
            fused.check_version()


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"beta": 1.5}, "beta: got 1.5, expected a number from 0 to 1"),
        (TypeError, {"beta": "half"}, "beta: got str 'half'"),
        (ValueError, {"reduction": "rows"}, "reduction: got 'rows', expected one of batchmean"),
        (TypeError, {"num_items_in_batch": True}, "num_items_in_batch: got True"),
        (ValueError, {"top_k": 2, "reduction": "none"}, "top_k: got 2"),
        (ValueError, {"top_k": 2, "reduction": "mean"}, "reduction: got 'mean' with top_k"),
    ],
)
def test_bad_arguments(error: type[Exception], options: dict[str, Any], message: str) -> None:
    s, t = pair(2, 5)
    with pytest.raises(error, match=message):
        fused.generalized_jsd_loss(s, t, **options)


def test_the_docstring_s_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "check_version", lambda: None)
    done = doctest.testmod(fused)
    assert done.attempted >= 4 and not done.failed
