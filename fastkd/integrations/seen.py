"""What hooks on the student have seen of its last forward, for the loss that follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import fastkd

# of the student's arguments, those that say how it answers: the teacher does not get them
ANSWER_OPTIONS = {"labels", "num_items_in_batch", "past_key_values", "use_cache", "logits_to_keep"}
ANSWER_OPTIONS |= {"return_dict", "output_hidden_states", "output_attentions", "return_loss"}
ANSWER_OPTIONS |= {"cache", "cache_params"}


class Seen:
    """The student's last forward as its hooks saw it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.stored: Any = None
        self.shifted: Tensor | None = None
        self.extra: dict[str, Any] = {}
        self.logits: fastkd.LinearLogits | None = None
        self.autocast: tuple[str, torch.dtype, bool] | None = None

    def arguments(self, given: dict[str, Any], columns: Iterable[str]) -> None:
        """Those of the forward; columns: of the batch, the teacher's alone."""
        self.stored, self.shifted = given.pop("teacher", None), given.pop("shift_labels", None)
        self.extra = {name: given.pop(name, None) for name in columns}
        self.inputs = {k: v for k, v in given.items() if k not in ANSWER_OPTIONS}

    def inside(self, arguments: Iterable[Any]) -> None:
        """Under which autocast a module within the student runs."""
        found = (x for x in arguments if isinstance(x, Tensor))
        device_type = next((x.device.type for x in found), "cpu")
        self.autocast = (
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )


def check_whole(weight: Tensor) -> None:
    """Raises ValueError where a head's weight cannot be read outside of the model's forward."""
    sharded = hasattr(weight, "placements")
    if sharded or not weight.numel() or not weight.untyped_storage().size():
        raise ValueError(
            "linear: got True with weights that are sharded outside of a model's forward (FSDP, "
            "ZeRO-3), expected linear=False (dense logits)"
        )
