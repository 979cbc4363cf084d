"""Automatic hyper-parameters: optuna where it is installed, random search otherwise."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastkd.arguments.messages import shown

from .logging import progress_bar
from .serialization import needed

BACKENDS = ("random", "optuna")


class Range(NamedTuple):
    """Numbers from `low` to `high`, both possible; `log`: uniform in the logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


class Search(NamedTuple):
    """Best parameters, their value, and every trial as (parameters, value) in order."""

    best: dict[str, Any]
    value: float
    trials: list[tuple[dict[str, Any], float]]


def search(
    objective: Callable[[dict[str, Any]], float],
    space: Mapping[str, Range | Sequence[Any]],
    *,
    trials: int = 20,
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> Search:
    """Look for the parameters at which `objective` is largest.

    Args:
        objective: parameters -> value, the higher the better, judged on data kept for it. NaN and
            FloatingPointError (a training that diverged) count as worst.
        space: name -> `Range`, or a sequence of choices.
        trials: calls of `objective`, at least 1.
        seed: the same one, the same trials (for a deterministic objective).
        start: parameters to try first, such as the defaults in use; the result is never worse.
        backend: "random", "optuna" (TPE), or None for optuna where it is installed.
        progress: show a tqdm bar.

    Raises:
        ValueError: an argument out of range, no trial with a value.

    Paper: Bergstra and Bengio 2012 (random search); Bergstra et al. 2011 (TPE).
    """
    if trials < 1:
        raise ValueError(f"trials: got {shown(trials)}, expected an integer >= 1")
    if backend is None:
        backend = "optuna" if importlib.util.find_spec("optuna") else "random"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {shown(backend)}, expected one of {BACKENDS} or None")
    for name, values in space.items():
        _check(name, values)
    if start is not None and set(start) != set(space):
        raise ValueError(f"start: got {sorted(start)}, expected the names {sorted(space)}")
    for name, values in space.items():
        if start is not None and not isinstance(values, Range) and start[name] not in values:
            raise ValueError(
                f"start: got {shown(start[name])} for {name!r}, expected one of {values}"
            )
    asked = _ask_optuna(space, seed, start) if backend == "optuna" else _ask(space, seed, start)
    bar = progress_bar(total=trials) if progress else None
    made: list[tuple[dict[str, Any], float]] = []
    best, value = None, -math.inf
    for _ in range(trials):
        params, tell = asked()
        try:
            got = float(objective(dict(params)))
        except FloatingPointError:
            got = math.nan
        tell(got)
        made.append((params, got))
        if got > value or (best is None and got == value):
            best, value = params, got
        if bar is not None:
            bar.update()
            bar.set_postfix(best=f"{value:.4g}")
    if bar is not None:
        bar.close()
    if best is None:
        raise ValueError(f"objective: got NaN in all {trials} trials, expected a number")
    return Search(best, value, made)


def _check(name: str, values: Any) -> None:
    if isinstance(values, Range):
        low, high, log, _ = values
        if not low <= high or not math.isfinite(high - low) or (log and low <= 0):
            wanted = "0 < low <= high" if log else "low <= high"
            raise ValueError(f"space: got {values} for {name!r}, expected {wanted}, both finite")
    elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(
            f"space: got {shown(values)} for {name!r}, expected a Range or some choices"
        )


def _ask(
    space: Mapping[str, Any], seed: int, start: Mapping[str, Any] | None
) -> Callable[[], tuple[dict[str, Any], Callable[[float], None]]]:
    generator = random.Random(seed)
    first = [] if start is None else [dict(start)]

    def draw(values: Any) -> Any:
        if not isinstance(values, Range):
            return generator.choice(values)
        low, high, log, integer = values
        if integer and not log:
            return generator.randint(int(low), int(high))
        x = (
            generator.uniform(math.log(low), math.log(high))
            if log
            else generator.uniform(low, high)
        )
        x = min(max(math.exp(x), low), high) if log else x
        return round(x) if integer else x

    def ask() -> tuple[dict[str, Any], Callable[[float], None]]:
        params = first.pop() if first else {name: draw(values) for name, values in space.items()}
        return params, lambda value: None

    return ask


def _ask_optuna(
    space: Mapping[str, Any], seed: int, start: Mapping[str, Any] | None
) -> Callable[[], tuple[dict[str, Any], Callable[[float], None]]]:
    optuna = needed("optuna", "backend='optuna'", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    if start is not None:
        indices = {
            name: value if isinstance(space[name], Range) else list(space[name]).index(value)
            for name, value in start.items()
        }
        study.enqueue_trial(indices)

    def suggest(trial: Any, name: str, values: Any) -> Any:
        if not isinstance(values, Range):  # by number: a choice may be anything
            return values[trial.suggest_categorical(name, list(range(len(values))))]
        if values.integer:
            return trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
        return trial.suggest_float(name, values.low, values.high, log=values.log)

    def ask() -> tuple[dict[str, Any], Callable[[float], None]]:
        trial = study.ask()
        params = {name: suggest(trial, name, values) for name, values in space.items()}

        def tell(value: float) -> None:
            failed = optuna.trial.TrialState.FAIL
            study.tell(trial, value) if math.isfinite(value) else study.tell(trial, state=failed)

        return params, tell

    return ask
