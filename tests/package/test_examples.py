"""Every example of the documents runs: a block of a README with the names that a reader has."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from causal_models import arguments, llama, ragged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import distill

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastkd", "csrc", "bench", "tests", ".github")
PAGES = [ROOT / "README.md", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.md")))]
BLOCKS = [
    (str(page.relative_to(ROOT)), block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
]
# what runs in a test of its own: tests/package/test_readme.py
ELSEWHERE = ("load_digits",)
# what needs a package or a server that is not here, or models whose tests are their own
NOT_RUN = {
    "timm.data.Mixup": "timm",
    'teacher="base"': "tests/distill/test_own_teachers.py",
    "distill.align(offsets": "tests/distill/test_uld_terms.py",
    "with Served(": "tests/teachers/test_habits_served.py",
    "hidden=True": "tests/teachers/test_hidden.py",
    "torch.randn(16, 8)": "tests/doctor/test_doctor.py",
    "class Mine(Family)": "shows how a file is laid out",
}
N, V = 6, 300

Names = dict[str, Any]


def logits(folder: Path) -> Names:
    """Two sides, labels, weights; a head and a stored teacher of each kind."""
    torch.manual_seed(0)
    heads = [nn.Linear(8, V, bias=False) for _ in range(2)]
    model, teacher_model = (nn.ModuleDict({"lm_head": head}) for head in heads)
    for one in (model, teacher_model):
        one.lm_head = one["lm_head"]
    return {
        "student": torch.randn(N, V, requires_grad=True) * 1,
        "teacher": torch.randn(N, V),
        "labels": torch.tensor([1, 2, -100, 3, 4, 5]),
        "student_logits": torch.randn(N, V, requires_grad=True),
        "teacher_logits": torch.randn(N, V),
        "w": torch.rand(N),
        "T": 2.0,
        "V": V,
        "num_items_in_batch": 12,
        "hidden": torch.randn(N, 8, requires_grad=True),
        "teacher_hidden": torch.randn(N, 8),
        "model": model,
        "teacher_model": teacher_model,
        "d2t": torch.arange(20) * 2,
        "draft_logits": torch.randn(N, 20, requires_grad=True),
        "target_logits": torch.randn(N, V),
        "own_rows": heads[0].weight,
    }


def maps(folder: Path) -> Names:
    """Logits of pixels, with labels that nobody gave."""
    labels = torch.randint(5, (2, 4, 4))
    labels[0, 0, 0] = 255
    sides = {name: torch.randn(2, 5, 4, 4, requires_grad=True) for name in ("student", "teacher")}
    return {**sides, "labels": labels}


def several(folder: Path) -> Names:
    """Several labels of a sample."""
    sides = {name: torch.randn(6, 5, requires_grad=True) for name in ("student", "teacher")}
    return {**sides, "labels": torch.randint(2, (6, 5)).float(), "w": torch.rand(5)}


def sharded(folder: Path) -> Names:
    """A group of one rank, another tool's file, and a teacher behind a server."""
    from fastkd.teachers import Served

    return {
        **captured(folder),
        **logits(folder),
        "Served": Served,
        "mesh": {"tp": dist.group.WORLD},
    }


def captured(folder: Path) -> Names:
    from fastkd.teachers import formats

    scores = torch.randn(N, V)
    record = formats.Record(
        tokens=torch.arange(N),
        topk=fastkd.topk_from_logits(scores[:-1], 8),
        teaches=torch.arange(1, N),
    )
    formats.write("distillkit", [record], folder / "captured")
    model = llama(vocab_size=V)
    return {
        "formats": formats,
        "student_model": model,
        "student": lambda ids: model(ids).logits,
        "V": V,
    }


def transformers(folder: Path) -> Names:
    from transformers import Trainer, TrainingArguments
    from trl.experimental.gkd import GKDTrainer

    from fastkd.integrations.transformers import DistillationTrainer

    return {
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "DistillationTrainer": DistillationTrainer,
        "GKDTrainer": GKDTrainer,
        "student": llama(),
        "teacher": llama(1),
        "args": arguments(folder),
        "data": ragged(),
    }


def images(folder: Path) -> Names:
    torch.manual_seed(0)
    x, y = torch.randn(1000, 64), torch.randint(10, (1000,))
    return {
        "images": x,
        "labels": y,
        "teacher": nn.Linear(64, 10),
        "student": nn.Linear(64, 10),
        "dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=100),
        "V": 10,
    }


def augmented(folder: Path) -> Names:
    from torch.utils.data import Subset

    from fastkd.teachers import store

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape)

    return {**images(folder), "store": store, "Subset": Subset, "transform": noisy}


def wide(folder: Path) -> Names:
    """The same with more classes than the example keeps."""
    return {**images(folder), "teacher": nn.Linear(64, V), "V": V}


def tokens(folder: Path) -> Names:
    """A dataset as transformers users have it, and a tokenizer that only pads."""
    import functools

    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    from fastkd.integrations.transformers import DistillationTrainer
    from fastkd.teachers import store

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]")
    data = [{key: value.tolist() for key, value in row.items()} for row in ragged(8)]
    return {
        "dataset": data,
        "tokenizer": tokenizer,
        "DataCollatorForSeq2Seq": DataCollatorForSeq2Seq,
        "TrainingArguments": lambda to, **more: arguments(folder / to, max_steps=1, **more),
        "DistillationTrainer": DistillationTrainer,
        "functools": functools,
        "store": store,
        "teacher": llama(1),
        "student": llama(),
        "V": llama().config.vocab_size,
    }


def _words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))


def by_rank(folder: Path) -> Names:
    """A store of one rank of one; Paired over it as the page's earlier block makes it."""
    import datasets
    from torch.utils.data import Subset

    from fastkd.teachers import store

    names = wide(folder)
    data = names["loader"].dataset
    store.capture(names["teacher"], names["loader"], "whole", vocab_size=V, k=32)
    reader = store.Reader("whole")
    return {
        **names,
        "in_order": names["loader"],
        "reader": reader,
        "pairs": store.Paired(data, reader),
        "datasets": datasets,
        "Subset": Subset,
        "store": store,
        "rank": 0,
        "n": 1,
        "size": 100,
    }


def convolutions(folder: Path) -> Names:
    """timm, or where that is missing (it needs torchvision) models with the names of its stages."""
    import types

    try:
        import timm
    except ImportError:
        from workflow_nets import ResNet

        def made(name: str, num_classes: int) -> nn.Module:
            model: Any = ResNet(4 if name == "resnet10t" else 8, num_classes)
            model.feature_info = [{"module": "layer1"}, {"module": "layer2"}]
            return model

        timm = types.SimpleNamespace(create_model=made)
    return {"timm": timm}


def nothing(folder: Path) -> Names:
    """What every block has: it takes no names of its own."""
    return {}


# a word of the block, and the names that it takes as given
GIVEN: tuple[tuple[str, str, Callable[[Path], Names]], ...] = (
    ("README.md", "# after: one pass", logits),
    ("README.md", "fastkd.divergences.js(beta=0.1)", logits),
    ("README.md", 'mesh["tp"]', sharded),
    ("README.md", "compute_loss_func", transformers),
    ("fastkd/README.md", "fastkd.LinearLogits", logits),
    ("fastkd/README.md", "class_dim=1", maps),
    ("fastkd/README.md", "fastkd.binary_kl_div", several),
    ("fastkd/distill/README.md", 'feature("layer1", "layer3"', nothing),
    ("fastkd/distill/README.md", "timm.create_model", convolutions),
    ("fastkd/integrations/README.md", "DistilBertConfig", nothing),
    ("fastkd/parallel/README.md", "own_rows", sharded),
    ("fastkd/integrations/README.md", "def collate", transformers),
    ("fastkd/integrations/README.md", "patch(GKDTrainer)", transformers),
    ("fastkd/distill/losses/README.md", "sentence_embedding", nothing),
    ("fastkd/distill/losses/README.md", "distill.channel_wise", nothing),
    ("fastkd/teachers/README.md", "# once, offline", logits),
    ("fastkd/teachers/README.md", "top_p=0.95", logits),
    ("fastkd/teachers/README.md", "d2t", logits),
    ("fastkd/teachers/formats/README.md", "formats.read", captured),
    ("fastkd/teachers/store/README.md", '"outputs"', wide),
    ("fastkd/teachers/store/README.md", "in_order = DataLoader(data", images),
    ("fastkd/teachers/store/README.md", "store.Views", augmented),
    ("fastkd/teachers/store/README.md", "hf_loader", tokens),
    ("fastkd/teachers/store/README.md", "world_size=n", by_rank),
)


def given(page: str, block: str) -> Callable[[Path], Names] | None:
    found = [names for where, word, names in GIVEN if where == page and word in block]
    assert len(found) < 2, f"{page}: a block has {len(found)} entries in GIVEN"
    return found[0] if found else None


ALL = [
    (page, block)
    for page, block in BLOCKS
    if not any(word in block for word in (*ELSEWHERE, *NOT_RUN))
]


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """This process is the one rank of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("page", "block"), ALL, ids=[f"{page}:{block[:30].splitlines()[0]}" for page, block in ALL]
)
def test_an_example_runs(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    names = given(page, block)
    assert names is not None, "a new example: say in GIVEN which names it takes, or in NOT_RUN why"
    monkeypatch.chdir(tmp_path)
    if "patch(GKDTrainer)" in block:  # the class is put back as it was
        from trl.experimental.gkd import GKDTrainer

        own = GKDTrainer.__dict__["generalized_jsd_loss"]
        monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", own)
    ready = {"torch": torch, "F": F, "nn": nn, "fastkd": fastkd, "distill": distill}
    ready |= {"DataLoader": DataLoader, "TensorDataset": TensorDataset, "copy": copy}
    exec(compile(block, page, "exec"), ready | names(tmp_path))


DOCTESTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "fastkd").rglob("*.py"))
    if ">>>" in path.read_text()
]
# tests of integrations run these, where the framework is set up
OWN = ("integrations.transformers", "integrations.trl", "integrations.lightning", "precision")


@pytest.mark.parametrize("name", [name for name in DOCTESTS if not name.endswith(OWN)])
def test_a_docstring_s_example_runs(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
