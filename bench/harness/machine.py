"""The machine that the numbers were measured on."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastkd
from bench.harness.timing import cores


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, JSON-ready."""
    info = fastkd.info()
    return {
        "cpu": _cpu_model(),
        "cores": len(cores()),
        "threads": torch.get_num_threads(),
        "huge_pages": _huge_pages(),
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastkd": fastkd.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "driver": None if device.type == "cpu" else driver(),
        "triton": info.get("triton"),
        "info": info,
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The same in one line."""
    info = facts["info"]
    parts = [f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"]
    if facts["device"] != "cpu" and info.get("gpu"):
        parts.insert(0, f"{info['gpu']['name']}")
    built = info.get("cpu")
    kernels = f"{built['isa']}" if built else "C++ extension not built"
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    parts.append(f"fastkd {facts['fastkd']} ({kernels}{commit})")
    parts.append(f"torch {facts['torch']}, Python {facts['python']}")
    return " | ".join([*parts, facts["date"]])


def driver() -> str | None:
    """The NVIDIA kernel driver's version; None where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def _huge_pages() -> str | None:
    """Linux's mode; the cost of fresh memory, a new gradient's too, depends on it."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return modes.partition("[")[2].partition("]")[0] or None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, "+" if its files differ from it; None outside of a checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")
