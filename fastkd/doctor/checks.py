"""What the records of a run show: who was trained, by which loss, with which factor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fastkd.scan import rules

from . import stored
from .findings import Finding, Findings, finding
from .flow import Part, Site, Term
from .source import step_calls

if TYPE_CHECKING:
    from .watch import Backward, Steps, Watch

UNUSED = "gets a gradient that no optimizer uses"
SOFT = ("kl", "hand", "soft", "fastkd")


def judged(watch: Watch) -> Findings:
    """All findings, in the order of the lines."""
    watch.busy += 1
    try:
        stored.judge(watch)
        checks = Checks(watch)
        for check in (
            checks.roles, checks.gradients, checks.factors, checks.denominators,
            checks.projectors, checks.schedules, checks.halves,
        ):  # fmt: skip
            check()
        return Findings(sorted(_marked(watch), key=lambda x: (x.file, x.line, x.name)))
    finally:
        watch.busy -= 1


def _marked(watch: Watch) -> Iterator[Finding]:
    names = {name for name, _ in watch.marks}
    for (name, site), (count, evidence, fix) in watch.marks.items():
        if count < 0.3 * watch.terms_at(site):
            continue
        if name == "mask" and evidence.startswith("all ") and count < watch.terms_at(site):
            continue
        if name == "gradient" and names & {"shared", "mask", "swapped"} and "optimizer" in evidence:
            continue  # its cause has been named
        yield finding(name, site.file, site.line, evidence, fix)


class Checks:
    """The checks, each over the records of a whole run."""

    def __init__(self, watch: Watch) -> None:
        self.watch, book = watch, watch.book
        self.all = list(watch.optimizers.values())
        used = [x for x in self.all if x.soft] or [x for x in self.all if x.count]
        self.used: list[Steps] = used
        self.trained = book.of_parameters(_held(used)) | watch.given
        self.optimized = book.of_parameters(_held(self.all)) | watch.given
        first = min((x.step for x in watch.terms if x.teacher is not None), default=0)
        self.terms = [x for x in watch.terms if x.step >= first]
        self.soft = [x for x in self.terms if x.teacher is not None and x.grad_mode]

    def mark(self, name: str, site: Site, evidence: str, fix: str = "") -> None:
        self.watch.mark(name, site, evidence, fix)
        self.watch.marks[name, site][0] = max(self.watch.terms_at(site), 1)

    # ---- who is who

    def roles(self) -> None:
        """Swapped operands; a teacher in training mode, with a gradient, in the optimizer."""
        taught = 0
        for one in self.terms:
            if one.student.grad:
                taught |= one.student.tag.mask
            if one.reverse and one.teacher is not None and one.teacher.grad:
                taught |= one.teacher.tag.mask
        pairs = {(x.student.tag.mask, x.teacher.tag.mask) for x in self.soft if x.teacher}
        for one in self.soft:
            assert one.teacher is not None
            a, b = one.student, one.teacher
            mine, other = a.tag.mask & self.trained, b.tag.mask & self.trained
            turned = bool(other) and not mine
            if not self.trained:
                turned = b.grad and not a.grad
                mine, other = int(a.grad), int(b.grad)
            if turned and one.kind != "pair" and (a.tag.mask or not self.trained):
                mutual = (b.tag.mask, a.tag.mask) in pairs
                meant = one.reverse and "distillation" not in one.name.lower()
                if not (mutual or meant or self._entropy(one)):
                    self._swapped(one)
                continue
            if turned and one.kind == "pair":
                a, b, other = b, a, 0  # its operands have no order
            if not b.tag.mask:
                continue
            if not other:
                if b.tag.noisy and not self._moves(b.tag.mask):
                    text = "the teacher's outputs went through dropout or batch statistics"
                    self.mark("teacher_mode", one.site, text)
                if b.grad and self.trained and self._own(b.tag.mask):
                    size = len(self._own(b.tag.mask))
                    text = f"the target requires grad: {size} teacher parameters get a gradient"
                    self.mark("teacher_gradient", one.site, text)
            elif other & ~taught and (other & ~taught).bit_count() > 0.5 * other.bit_count():
                if mine & other == other or ("shared", one.site) in self.watch.marks:
                    continue
                count = other.bit_count()
                text = f"{count} parameters of the teacher are in the optimizer"
                fix = "torch.optim.AdamW(student.parameters())"
                self.mark(
                    "teacher_gradient", self.used[0].made if self.used else one.site, text, fix
                )

    def _own(self, mask: int) -> list[object]:
        """A teacher's parameters that require grad, without those of a projector behind it."""
        behind = set[int]()
        for at, module in self.watch.modules.items():
            if self.watch.fed.get(at, 0) and self.watch.roots.get(at):
                behind |= {id(x) for x in module.parameters()}
        held = self.watch.book.within(mask & self.watch.graded)
        return [x for x in held if x.requires_grad and id(x) not in behind]

    def _moves(self, mask: int) -> bool:
        """Whether a teacher's parameters change without an optimizer: an average of the student."""
        first, last = self.watch.changed.get(mask & -mask, (0.0, 0.0))
        return first != last

    def _entropy(self, one: Term) -> bool:
        return one.kind == "hand" and one.student.tag.pair is not None

    def _swapped(self, one: Term) -> None:
        what = f"{rules.SWAPPED.seen} (not trained), the second the student's"
        fix = ""
        if one.kind == "fastkd":
            fix = f"{one.name}(student_logits, teacher_logits, ...)"
        self.mark("swapped", one.site, f"{one.name}: {what} (trained)", fix)

    # ---- gradients

    def gradients(self) -> None:
        """Optimizers that no gradient reaches; soft terms that have none."""
        for steps in self.used:
            if steps.count and not steps.moved:
                text = f"no gradient but 0 in {steps.count} steps of {_class(steps.optimizer)}: "
                half = any(x.student.dtype.itemsize == 2 for x in self.soft)
                name = "float16" if half and self.watch.half else "gradient"
                self.mark(name, steps.site, text + "no parameter of the optimizer is trained")
        counts: dict[Site, list[int]] = defaultdict(lambda: [0, 0])
        for backward in self._backwards():
            for part in backward.parts:
                if part.term.teacher is None:
                    continue
                one = part.term
                without = part.detached or not (one.student.grad or one.teacher.grad)  # type: ignore[union-attr]
                counts[one.site][0] += int(without)
                counts[one.site][1] += 1
            if not backward.grad:
                self.mark("gradient", backward.site, "backward of a loss that requires no grad")
        asked = {x.site for _, x in self.watch.items if x.teacher is not None} - set(counts)
        for site in asked if self.watch.added else ():
            text = "the soft term enters the sum as a number, by .item() or float(): no gradient"
            self.mark("gradient", site, text, "add the tensor itself")
        for site, (lost, total) in counts.items():
            if lost > 0.5 * total:
                self.mark("gradient", site, f"the soft term had no gradient in {lost} of {total}")

    def _backwards(self) -> list[Backward]:
        return [x for step in self.watch.backwards for x in step]

    # ---- factors

    def factors(self) -> None:
        """T^2, once; means over rows, not over rows and classes."""
        for step in self.watch.backwards:
            for backward in step:
                hard = [x for x in backward.parts if x.term.kind == "hard"]
                weight = sum(_size(x) for x in hard)
                common = min((sum(n for _, n in x.powers) for x in hard), default=0.0)
                for part in backward.parts:
                    one, t = part.term, part.term.temperature
                    if one.kind in SOFT and not part.detached:
                        self._reduction(part, hard)
                    if one.kind not in SOFT or abs(t - 1.0) < 0.05 or part.detached:
                        continue
                    self._factor(part, weight, len(step), common)

    def _reduction(self, part: Part, hard: list[Part]) -> None:
        """No mean over the rows, unless a weight makes up for it."""
        one, size, by = part.term, _size(part), part.columns
        plain = size / one.temperature ** max(sum(x for _, x in part.powers), 0.0)
        weight = sum(_size(x) / x.columns for x in hard)
        rows = max((x.term.rows for x in hard), default=0.0)
        if by > 1 and plain < by:
            text = f"a mean over {one.rows:g} rows times {by:g} columns: "
        elif (
            by < 1
            and weight <= 1 + 1e-3
            and plain > by * (1 + 1e-3)
            and rows > 1.001 * one.rows * by
        ):
            text = f"batchmean of {one.rows:g} rows divides by {one.rows * by:g}, the hard mean by "
            text += f"{rows:g}: "
        else:
            return
        text += (
            f"the soft term's factor is {size / by:.4g}, a mean over the rows makes it {size:.4g}"
        )
        self.mark("reduction", one.site, text)

    def _factor(self, part: Part, hard: float, count: int, common: float) -> None:
        """`common`: powers of T before the sum of both terms."""
        one, t = part.term, part.term.temperature
        powers = one.power + sum(x for _, x in part.powers) - common
        soft, hard = _size(part) / t**common, hard / t**common
        shares = (1.0, 1.0 / max(count, 1))
        sums = {n: [hard / c + soft / (c * t**n) for c in shares] for n in (2, 4)}
        site = part.powers[-1][0] if part.powers else one.site
        doubled = powers >= 4 or (powers == 0 and hard and _is_one(sums[4]) and t >= 1.5)
        if doubled:
            said = " (distillation_loss has it already)" if one.power == 2 else ""
            text = f"the soft term is multiplied by T^4 = {t**4:g} at T = {t:g}{said}"
            self.mark("temperature", site, text, "multiply by T * T once")
        elif powers == 0 and hard > 0 and t >= 1.5 and soft <= 1.0 + 1e-3 and not one.reverse:
            if not _is_one(sums[2]):
                without = f"without T^2 = {t * t:g}" if not common else "T^2 is on both of them"
                text = f"T = {t:g}: the soft term's factor is {soft / part.columns:.4g} beside a "
                self.mark("temperature", one.site, text + f"hard one of {hard:.4g}, {without}")

    # ---- accumulation

    def denominators(self) -> None:
        """Micro-batches of different sizes that count the same."""
        uneven: dict[Site, list[int]] = defaultdict(lambda: [0, 0])
        seen: dict[Site, str] = {}
        for step in self.watch.backwards[:-1]:
            groups: dict[Any, list[tuple[float, Term]]] = defaultdict(list)
            for backward in step:
                chosen = {x.term.rows for x in backward.parts if x.term.sampled}
                for part in backward.parts:
                    if part.term.kind != "pair" and part.term.rows not in (0, *chosen):
                        trained = backward.mask & self.trained
                        key = (backward.place, part.term.place, part.term.kind, trained)
                        groups[key].append((abs(part.factor) / part.columns, part.term))
            for parts in groups.values():
                factors, rows = [x for x, _ in parts], [x.rows for _, x in parts]
                site = parts[0][1].site
                if len(parts) < 2 or min(factors) <= 0:
                    continue
                uneven[site][1] += 1
                if max(rows) > 1.02 * min(rows) and max(factors) > 1.02 * min(factors):
                    uneven[site][0] += 1
                    sizes = ", ".join(f"{x:g}" for x in rows[:6])
                    weights = ", ".join(f"{x:.3g}" for x in factors[:6])
                    seen.setdefault(site, f"rows {sizes} count {weights} each")
        for site, (wrong, total) in uneven.items():
            if wrong > 0.5 * total:
                self.mark("denominator", site, f"micro-batches of one step: {seen[site]}")
        self._undivided()

    def _undivided(self) -> None:
        wrong = total = count = 0
        site = Site("", 0)
        for step in self.watch.backwards[:-1]:
            if len(step) < 2 or len({(x.place, x.mask) for x in step}) > 1:
                continue
            if not any(p.term.teacher is not None for x in step for p in x.parts):
                continue
            if len({tuple(p.term.place for p in x.parts) for x in step}) > 1:
                continue  # parts of one loss, each with its own backward
            total += 1
            sums = [
                sum(_size(p) / _square(p) for p in x.parts if p.term.kind in (*SOFT, "hard"))
                for x in step
            ]
            if all(_is_one([x]) for x in sums):
                wrong, count, site = wrong + 1, len(step), step[0].site
        if wrong and wrong > 0.5 * total:
            text = (
                f"{count} calls of backward in a step, each of a whole mean: not divided by {count}"
            )
            self.mark("denominator", site, text, "(loss / accumulation_steps).backward()")

    # ---- modules outside of the optimizer

    def projectors(self) -> None:
        """Modules behind the student or the teacher whose gradient nobody uses."""
        watch, book = self.watch, self.watch.book
        if not self.all:
            return
        graded = {id(x) for x in book.within(watch.graded & ~self.optimized) if x.requires_grad}
        inside = {id(x) for x in book.within(self.optimized)}
        loose = dict[int, nn.Module]()
        for at, module in watch.modules.items():
            held = [id(x) for x in module.parameters()]
            if held and not any(x in inside for x in held) and any(x in graded for x in held):
                loose[at] = module
        inner = {id(x) for m in loose.values() for x in m.modules() if x is not m}
        teachers = 0
        for one in self.soft:
            assert one.teacher is not None
            for side in (one.student, one.teacher)[one.kind != "pair" :]:
                if not side.tag.mask & self.trained:
                    teachers |= side.tag.mask
        owned = set[int]()
        for at, module in loose.items():
            owned |= {id(x) for x in module.parameters()}
            fed = watch.fed.get(at, 0)
            own = book.of_parameters(module.parameters())
            if at in inner or not fed & (self.trained | (teachers & ~own)):
                continue
            count = sum(x.numel() for x in module.parameters())
            name, site = watch.names.get(at, (_class(module), Site("", 0)))
            text = f"{name} ({_class(module)}, {count} numbers) {UNUSED}"
            fix = f'optimizer.add_param_group({{"params": {name}.parameters()}})'
            self.mark("projector", site, text, fix)
        owned |= {id(x) for m in watch.modules.values() for x in m.parameters()}
        for x in book.within(watch.graded & ~self.optimized):
            if isinstance(x, nn.Parameter) and id(x) not in owned:
                text = f"a parameter of shape {tuple(x.shape)} {UNUSED}"
                self.mark("projector", self.used[0].made if self.used else Site("", 0), text)

    # ---- schedules and float16

    def schedules(self) -> None:
        """Schedules that are never stepped, or whose learning rate is not used."""
        watch = self.watch
        inner = {id(y) for x in watch.schedules for y in getattr(x.schedule, "_schedulers", ())}
        here = {id(x.optimizer) for x in self.used}
        made: dict[Site, int] = defaultdict(int)
        for one in watch.schedules:
            made[one.made] += 1
        lines = step_calls(watch.files | {x.made.file for x in watch.schedules if x.made.file})
        left = lines - watch.step_lines
        for one in watch.schedules:
            schedule, name = one.schedule, one.name
            if id(schedule) in inner or not self.used:
                continue
            stepped = getattr(schedule, "_step_count", 1) > 1 or schedule.last_epoch > 0
            mine = id(schedule.optimizer) in here
            by_hand = any(x.site in lines for x in self.used)
            if not stepped and mine and not left and by_hand:
                count = max(x.count for x in self.used)
                text = f"{name} was made and never stepped in {count} steps of the optimizer"
                self.mark("schedule", one.made, text)
            elif one.told >= 2 and one.other >= 0.8 * one.told:
                text = f"{name}: the optimizer did not use its learning rate in {one.other} of "
                self.mark(
                    "schedule",
                    one.made,
                    text + f"{one.told} steps: it was put back",
                    "leave the rate to scheduler.step()",
                )
            elif stepped and not mine and any(not x.count for x in self.all):
                text = f"{name} is over an optimizer that makes no step"
                self.mark(
                    "schedule", one.made, text, f"{name}(optimizer, ...)  # the one that steps"
                )
            elif made[one.made] > 2 and not mine | (one is watch.schedules[-1]):
                text = f"{name} was made {made[one.made]} times: each begins again"
                self.mark("schedule", one.made, text, "make optimizer and schedule once, before")
        for steps in self.used:
            if len(steps.lrs) > 1 and not any(steps.lrs):
                site = next((x.made for x in watch.schedules), steps.made)
                text = f"the learning rate was 0 in all {len(steps.lrs)} steps"
                self.mark("schedule", site, text)

    def halves(self) -> None:
        """Gradients that float16 rounds to 0, without a loss scale."""
        for site, lost in self.watch.half.items():
            share = sum(lost) / len(lost)
            if share > 0.2:
                text = f"{share:.0%} of a float16 gradient is 0 or below 6.1e-05; no loss scale"
                self.mark("float16", site, text)


def _held(optimizers: list[Steps]) -> Iterator[nn.Parameter]:
    for steps in optimizers:
        for group in steps.optimizer.param_groups:
            yield from group["params"]


def _size(part: Part) -> float:
    return abs(part.factor) * part.term.rows


def _square(part: Part) -> float:
    powers = max(part.term.power, 0) + sum(x for _, x in part.powers)
    return part.term.temperature**powers if part.term.teacher is not None else 1.0


def _is_one(sums: list[float]) -> bool:
    return any(abs(x - 1.0) < 2e-3 for x in sums)


def _class(value: object) -> str:
    return type(value).__name__
