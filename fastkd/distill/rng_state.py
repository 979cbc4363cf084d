"""Where random numbers come from, and how their sources are put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from .serialization import needed


def random_state(loader: Any, device: torch.device) -> dict[str, Any]:
    """State of all sources of random numbers: python, numpy, torch, the loader's generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["loader"] = [generator.get_state() for generator in generators(loader)]
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], loader: Any, device: torch.device) -> None:
    """Put `random_state` back."""
    for generator, value in zip(generators(loader), state["loader"], strict=True):
        generator.set_state(value)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        numpy = needed("numpy", "a checkpoint of a run with NumPy")
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)


def generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and of what it is made of."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    waiting = [loader]
    while waiting:
        owner = waiting.pop(0)
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for value in (getattr(owner, "__dict__", None) or {}).values():
            if isinstance(value, torch.Generator):
                found.setdefault(id(value), value)
        inner = (getattr(owner, n, None) for n in ("batch_sampler", "sampler", "dataset", "loader"))
        waiting += [part for part in inner if part is not None]
    return list(found.values())
