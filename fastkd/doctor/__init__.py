"""The doctor: runs some steps of a training, and names what is wrong with its distillation."""

from __future__ import annotations

from fastkd.scan.rules import FAULTS

from .findings import Finding, Findings, report
from .script import Examined, examine

__all__ = ["FAULTS", "Examined", "Finding", "Findings", "examine", "report"]
