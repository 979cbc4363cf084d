"""What transformers' Trainer with fastkd adds to the same step written by hand, and what it saves.

Three providers train the same tiny Llama beside the same teacher on the same batches from the same
weights: the step written by hand with `LinearLogits`, `DistillationTrainer`, and a Trainer whose
`compute_loss` is the formula in plain torch on logits of both models. A run is timed from the end
of its second step to the end of its last one. The losses of the three must agree.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import fastkd
from bench.families.trainer import add_overhead, overhead_cells, too_slow
from bench.harness.family import Family, Input
from bench.harness.gate import Wrong
from bench.harness.measure import Comparison, Provider, Ready
from bench.harness.result import Group, Result
from bench.harness.timing import CLOCKS, Sample
from fastkd.integrations.transformers import DistillationTrainer

LIMIT = 0.02  # of the hand-written step's time
T, ALPHA, LR = 2.0, 0.1, 1e-3
CLIP = 1.0  # of the gradient's norm, as the Trainer does unless told otherwise
PROVIDERS = ("hand", "fastkd", "eager")
WARM = 2  # steps that are not timed
CLOSE = 1e-3  # of the loss: float32 sums of other orders, over a few steps


class Case(NamedTuple):
    """Sizes of the models (the teacher has twice the layers) and the batches."""

    name: str
    hidden: int
    layers: int
    vocab: int
    rows: int
    length: int
    steps: int
    counts: bool


CASES = {
    case.name: case
    for case in (
        Case("demo", 256, 2, 32768, 4, 128, 6, True),
        Case("wide", 256, 2, 151936, 2, 128, 4, True),
        Case("tiny", 16, 1, 99, 2, 8, 4, False),
    )
}


def llama(case: Case, layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, case.hidden // 64),
        num_key_value_heads=max(1, case.hidden // 64),
    )
    return transformers.LlamaForCausalLM(config)


class Stopwatch(transformers.TrainerCallback):  # type: ignore[misc]
    """When each step ended, on the given clock; the device has done its work by then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.ends = clock, list[float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(self.clock())

    def per_step(self) -> float:
        """Milliseconds of a step behind the first ones."""
        return (self.ends[-1] - self.ends[WARM - 1]) / (len(self.ends) - WARM) * 1e3


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor, total: Any) -> Tensor:
    s, t, labels = student[:, :-1].float(), teacher[:, :-1].float(), labels[:, 1:]
    s, t, labels = s.flatten(0, 1), t.flatten(0, 1), labels.flatten()
    hard = F.cross_entropy(s, labels, reduction="sum")
    soft = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="sum")
    return (ALPHA * hard + (1 - ALPHA) * T * T * soft) / total


class Eager(transformers.Trainer):  # type: ignore[misc]
    """The Trainer as people write it today."""

    teacher: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens = inputs["input_ids"]
        with torch.no_grad():
            out = self.teacher(tokens, use_cache=False).logits
        outputs = model(tokens)
        loss = eager_loss(outputs.logits, out, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def hand(student: Any, teacher: Any, data: list[Any], case: Case, watch: Stopwatch) -> list[float]:
    """The loop written out with fastkd."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, fused=True)
    device, losses = next(student.parameters()).device, []
    batches: Any = torch.utils.data.DataLoader(data, batch_size=case.rows)  # type: ignore[arg-type]
    student.train()
    teacher.eval()
    for _, batch in zip(range(case.steps), batches, strict=False):
        tokens, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.no_grad():
            h = teacher.model(tokens, use_cache=False).last_hidden_state
            out = fastkd.LinearLogits(h, teacher.lm_head.weight)
        h = student.model(tokens, use_cache=False).last_hidden_state
        loss = fastkd.distillation_loss(
            fastkd.LinearLogits(h, student.lm_head.weight),
            out,
            F.pad(labels[:, 1:], (0, 1), value=-100),
            temperature=T,
            alpha=ALPHA,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP).item()  # which is logged
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        watch.on_step_end()
    return losses


def trainer(side: str, student: Any, teacher: Any, data: list[Any], case: Case, folder: str) -> Any:
    args = transformers.TrainingArguments(
        folder,
        max_steps=case.steps,
        per_device_train_batch_size=case.rows,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=1e-2,  # AdamW's own
        max_grad_norm=CLIP,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    given: dict[str, Any] = {"model": student, "args": args, "train_dataset": data}
    if side == "fastkd":
        loss = {"temperature": T, "alpha": ALPHA}
        made = DistillationTrainer(**given, teacher=teacher, loss=loss)
    else:
        made = Eager(**given)
        made.teacher = teacher
    made.remove_callback(transformers.PrinterCallback)
    return made


class Runs:
    """The runs of one case: models, data, and the losses of each provider's last run."""

    def __init__(self, case: Case, clock: Callable[[], float]) -> None:
        torch.manual_seed(0)
        self.case, self.clock = case, clock
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = llama(case, case.layers)
        self.teacher = llama(case, 2 * case.layers).to(self.device).requires_grad_(False).eval()
        tokens = torch.randint(case.vocab, (case.rows * case.steps, case.length))
        self.data = [{"input_ids": row, "labels": row} for row in tokens]
        self.losses: dict[str, list[float]] = {}

    def _made(self, name: str, student: Any, folder: str) -> Any:
        return trainer(name, student, self.teacher, self.data, self.case, folder)

    def sample(self, name: str) -> float:
        """Milliseconds of a step in a run of its own."""
        own, watch = copy.deepcopy(self.student).to(self.device), Stopwatch(self.clock)
        if name == "hand":
            self.losses[name] = hand(own, self.teacher, self.data, self.case, watch)
            return watch.per_step()
        with tempfile.TemporaryDirectory() as folder:
            made = self._made(name, own, folder)
            made.add_callback(watch)
            made.train()
        history = made.state.log_history
        self.losses[name] = [line["loss"] for line in history if "loss" in line]
        return watch.per_step()

    def step(self, name: str) -> Callable[[], object]:
        """A step of a Trainer, which has run before."""
        with tempfile.TemporaryDirectory() as folder:
            made = self._made(name, copy.deepcopy(self.student), folder)
            made.train()
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
        count = torch.tensor(self.case.rows * (self.case.length - 1), device=self.device)
        return lambda: made.training_step(made.model, dict(batch), count)

    def verify(self, name: str) -> None:
        """That the losses are those of the loop by hand."""
        for one, other in zip(self.losses["hand"], self.losses[name], strict=True):
            if not abs(one - other) <= CLOSE * abs(one):
                raise Wrong(
                    f"the losses differ: {self.losses[name]}, by hand {self.losses['hand']}"
                )

    def ready(self, name: str) -> Ready:
        # eager is beyond the comparison that counts: every fourth turn will do
        every = 4 if name == "eager" else 1
        memory = None if name == "hand" else partial(self.step, name)
        samples: dict[str, Sample] = {"step": partial(self.sample, name)}
        return Ready(samples, memory, every=every, verify=partial(self.verify, name))


class Integrations(Family):
    name = "integrations"
    about = "integrations: transformers' Trainer with fastkd beside the same step by hand."
    cases = {
        case.name: f"{case.rows * case.length} rows of {case.vocab} columns, hidden {case.hidden}"
        for case in CASES.values()
    }
    toy_cases = ("tiny",)
    clocks = True
    limit = LIMIT
    seconds = 30.0
    rounds = (3, 1_000_000)
    bases = ("eager",)
    legend = """\
Time is the median step of interleaved runs, "peak extra" the peak memory of a step; the overhead
over the step by hand is the median over pairs of runs. The losses of all agree."""

    def comparison(self, one: Input, a: argparse.Namespace) -> Comparison:
        case = CASES[one.case]
        runs, rows = Runs(case, CLOCKS[a.clock]), case.rows * case.length
        return Comparison(
            *(case.name, "", case.name, "float32", runs.device),
            [Provider(name, partial(runs.ready, name), name != "eager") for name in PROVIDERS],
            rows * case.vocab * 4,
            alternate=True,
            figures={"counts": case.counts, "rows": rows, "vocab": case.vocab},
        )

    def finish(self, results: list[Result]) -> None:
        add_overhead(results, "step")

    def counted(self, result: Result) -> dict[str, str]:
        size = f"{result.figures['rows']} x {result.figures['vocab']}"
        return {"rows x vocab": size} | overhead_cells(result)

    def complaints(self, groups: Sequence[Group], a: argparse.Namespace) -> list[str]:
        return too_slow(groups, a.limit)


FAMILY = Integrations()
