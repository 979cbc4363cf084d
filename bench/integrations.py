"""What transformers' Trainer with fastkd adds to the same step written by hand, and what it saves.

Three sides train the same tiny Llama beside the same teacher on the same batches from the same
weights, in turns: the step written by hand with `LinearLogits`, `DistillationTrainer`, and a
Trainer whose `compute_loss` is the formula in plain torch on logits of both models. A run is timed
from the end of its second step to the end of its last one; a pair's overhead is the ratio of its
two times, and the median over pairs is what counts. The losses of the three must agree.

    python -m bench.integrations --seconds 60 --json integrations.json

Exit status: 0, or 1 where the overhead is above --limit in a case that counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import fastkd
from bench.timing import no_collection, percentile, summarise
from fastkd.demo.memory import peak_extra
from fastkd.integrations.transformers import DistillationTrainer

LIMIT = 0.02  # of the hand-written step's time
T, ALPHA, LR = 2.0, 0.1, 1e-3
CLIP = 1.0  # of the gradient's norm, as the Trainer does unless told otherwise
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIDES = ("hand", "fastkd", "eager")
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


CASES = [
    Case("demo", 256, 2, 32768, 4, 128, 6, True),
    Case("wide", 256, 2, 151936, 2, 128, 4, True),
    Case("tiny", 16, 1, 99, 2, 8, 4, False),
]


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
            said = self.teacher(tokens, use_cache=False).logits
        outputs = model(tokens)
        loss = eager_loss(outputs.logits, said, inputs["labels"], num_items_in_batch)
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
            said = fastkd.LinearLogits(h, teacher.lm_head.weight)
        h = student.model(tokens, use_cache=False).last_hidden_state
        loss = fastkd.distillation_loss(
            fastkd.LinearLogits(h, student.lm_head.weight),
            said,
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


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of a step on each side, the overhead's median and percentiles, peak memory."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = llama(case, case.layers), llama(case, 2 * case.layers).to(device)
    teacher.requires_grad_(False).eval()
    tokens = torch.randint(case.vocab, (case.rows * case.steps, case.length))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    block = case.rows * case.length * case.vocab * 4
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    ends = time.perf_counter() + seconds
    with no_collection(), tempfile.TemporaryDirectory() as folder:
        for turn in range(1_000_000):
            if turn >= 4 and time.perf_counter() > ends:
                break
            # eager is beyond the comparison that counts: every fourth turn will do
            order = [side for side in SIDES if side != "eager" or turn % 4 == 0]
            for side in order if turn % 2 else order[::-1]:
                own, watch = copy.deepcopy(student).to(device), Stopwatch(clock)
                if side == "hand":
                    losses[side] = hand(own, teacher, data, case, watch)
                else:
                    made = trainer(side, own, teacher, data, case, folder)
                    made.add_callback(watch)
                    made.train()
                    history = made.state.log_history
                    losses[side] = [line["loss"] for line in history if "loss" in line]
                times[side].append(watch.per_step())
        for side in ("fastkd", "eager"):
            made = trainer(side, copy.deepcopy(student), teacher, data, case, folder)
            made.train()
            batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
            count = torch.tensor(case.rows * (case.length - 1), device=device)

            def step(made: Any = made, batch: Any = batch, count: Any = count) -> Any:
                return made.training_step(made.model, dict(batch), count)

            memory[side] = peak_extra(step, device, block)
    for side in SIDES:
        for one, other in zip(losses["hand"], losses[side], strict=True):
            if not abs(one - other) <= CLOSE * abs(one):
                raise SystemExit(f"{case.name}: the losses differ: {losses}")
    pairs = list(zip(times["hand"], times["fastkd"], strict=True))[1:]  # the first warms up
    ratios = [b / a - 1 for a, b in pairs]
    middle = {side: summarise(times[side]).median for side in SIDES}
    return {
        "case": case.name,
        "counts": case.counts,
        "device": device.type,
        "rows": case.rows * case.length,
        "vocab": case.vocab,
        **{f"{side}_ms": middle[side] for side in SIDES},
        "overhead": percentile(ratios, 0.5),
        "overhead_p20": percentile(ratios, 0.2),
        "overhead_p80": percentile(ratios, 0.8),
        "pairs": len(ratios),
        "faster": middle["eager"] / middle["fastkd"],
        "peak_mib": {side: bytes / 2**20 for side, bytes in memory.items()},
    }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal: milliseconds of a step, peak memory of a step."""
    lines = [
        f"{'case':6}{'rows x vocab':>15}{'hand ms':>10}{'fastkd ms':>11}{'overhead':>10}"
        f"{'p20 .. p80':>18}{'pairs':>7}{'eager ms':>10}{'faster':>8}{'MiB fastkd':>12}{'eager':>9}"
    ]
    for row in rows:
        size, peak = f"{row['rows']} x {row['vocab']}", row["peak_mib"]
        line = f"{row['case']:6}{size:>15}{row['hand_ms']:10.1f}{row['fastkd_ms']:11.1f}"
        line += f"{row['overhead']:10.1%}{row['overhead_p20']:9.1%} .. {row['overhead_p80']:5.1%}"
        line += f"{row['pairs']:7}{row['eager_ms']:10.1f}{row['faster']:7.2f}x"
        lines.append(line + f"{peak['fastkd']:12.1f}{peak['eager']:9.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON where asked."""
    names = [case.name for case in CASES]
    assert __doc__ is not None
    parser = argparse.ArgumentParser("python -m bench.integrations", description=__doc__[:95])
    parser.add_argument("--cases", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each case (default 30)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: of this process, where others want the cores (default wall)",
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"default {LIMIT}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    wanted = options.cases.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--cases: got {sorted(unknown)}, expected some of {names}")
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    rows = [measure(case, options.seconds, clock) for case in CASES if case.name in wanted]
    print(as_text(rows))
    if options.json is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        setting = {"limit": options.limit, "clock": options.clock, "cases": rows}
        options.json.write_text(json.dumps(versions | setting) + "\n", encoding="utf-8")
    over = [row for row in rows if row["counts"] and row["overhead"] > options.limit]
    for row in over:
        print(f"{row['case']}: {row['overhead']:.1%} is above the limit of {options.limit:.0%}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
