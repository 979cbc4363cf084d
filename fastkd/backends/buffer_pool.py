"""A pool of gradient buffers on the CPU, used again.

A fresh gradient of 65 MB costs as much in page faults and zeroing as the loss itself, at every
step. So large ones come from here: storages that this module keeps, and hands out again once no
tensor or storage object of theirs is left. A gradient that is still referenced anywhere, say as a
leaf's `.grad`, is left alone, and so is one that another process shares. What is kept is bounded
by FASTKD_POOL_MB (read at import; 0 switches the pool off); a larger gradient is torch's
business as ever.
"""

from __future__ import annotations

import os
import sys
import threading

import torch
from torch import Tensor

LEAST = 1 << 22  # bytes: smaller blocks come from malloc's own free lists, without page faults


def _limit() -> int:
    text = os.environ.get("FASTKD_POOL_MB", "256")
    if not text.isdecimal():
        raise ValueError(f"FASTKD_POOL_MB: got {text!r}, expected a whole number of megabytes")
    return int(text) << 20


limit = _limit()
_kept: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(like: Tensor) -> Tensor:
    """A contiguous tensor of like's shape and dtype, not initialised."""
    size = like.nbytes
    if not LEAST <= size <= limit:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    with _lock:
        # one that was sent to another process is that process's too, for good
        _kept[:] = [storage for storage in _kept if not storage.is_shared()]
        for storage in _kept:
            if storage.nbytes() == size and _free(storage):
                # inside the lock: from here on the storage counts as used
                flat = like.new_empty(0).set_(storage, 0, (like.numel(),), (1,))
                return flat.view(like.shape)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        _make_room(size)
        _kept.append(out.untyped_storage())
    return out


def release() -> None:
    """Gives the kept buffers that nobody uses back to the system."""
    with _lock:
        _kept[:] = [storage for storage in _kept if not _free(storage)]


def _free(storage: torch.UntypedStorage) -> bool:
    """Nobody but `_kept` has it: no tensor, no Python storage object, no other process."""
    python = sys.getrefcount(storage)  # _kept, the caller's loop, this argument, getrefcount's
    used = torch._C._storage_Use_Count(storage._cdata) != 1 or python > 4
    return not (used or storage.is_shared())


def _make_room(size: int) -> None:
    """Forgets buffers, oldest first, until `size` more bytes fit; tensors in use live on."""
    while _kept and sum(storage.nbytes() for storage in _kept) + size > limit:
        del _kept[0]
