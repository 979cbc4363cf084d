"""Global and shared memory: bounds, alignment, races, and how many sectors an access takes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch

BASE = 1 << 33  # where global memory begins: no address fits into 32 bits
GAP = 4096  # bytes between two tensors, which belong to nobody
SECTOR = 32  # bytes that memory moves at once
GRANULE = 2  # bytes that the search for races tells apart
NOBODY, MANY = -1, -2


class Fault(Exception):
    """What a GPU would not do, or would do differently from run to run."""


class Place(NamedTuple):
    """Of each lane that takes part in an access: its warp, its block, and that block's epoch.

    An epoch is what lies between two barriers of a block.
    """

    warp: Any
    block: Any
    epoch: Any


class Shadow:
    """Who has read and written each granule last, to find two accesses that nothing orders.

    Two warps of a block are ordered by a barrier between them, blocks of one launch by nothing. A
    write that changes nothing of what another has written is no race, and is not noted.
    """

    def __init__(self, size: int) -> None:
        n = -(-size // GRANULE)
        self.writer, self.reader = (np.full(n, NOBODY, np.int32) for _ in range(2))
        self.write_block, self.read_block = (np.full(n, NOBODY, np.int32) for _ in range(2))
        self.write_epoch, self.read_epoch = (np.full(n, NOBODY, np.int32) for _ in range(2))

    def note(self, offset: Any, size: int, place: Place, writes: bool) -> None:
        each = -(-size // GRANULE)
        at = offset // GRANULE
        if each > 1:
            at = (at[:, None] + np.arange(each)).reshape(-1)
            place = Place(*(np.repeat(x, each) for x in place))
        warp, block, epoch = place
        clash = self._clash(self.writer, self.write_block, self.write_epoch, at, place)
        if writes:
            clash |= self._clash(self.reader, self.read_block, self.read_epoch, at, place)
            self.writer[at], self.write_block[at], self.write_epoch[at] = warp, block, epoch
        else:
            shared = (self.reader[at] != warp) & (self.reader[at] != NOBODY)
            shared &= self.read_epoch[at] == epoch
            blocks = (self.read_block[at] != block) & (self.read_block[at] != NOBODY)
            self.reader[at] = np.where(shared, MANY, warp)
            self.read_block[at] = np.where(blocks, MANY, block)
            self.read_epoch[at] = epoch
            # several warps in this very access: the last one stands there
            self.reader[at[(self.reader[at] != warp) & ~shared]] = MANY
            self.read_block[at[(self.read_block[at] != block) & ~blocks]] = MANY
        if clash.any():
            kind = "write" if writes else "read"
            raise Fault(f"race: {kind} at byte {int(at[clash][0]) * GRANULE} beside another warp")

    @staticmethod
    def _clash(owner: Any, block: Any, epoch: Any, at: Any, place: Place) -> Any:
        other = (owner[at] != place.warp) & (owner[at] != NOBODY) & (epoch[at] == place.epoch)
        return other | ((block[at] != place.block) & (block[at] != NOBODY))


class Space:
    """Bytes that are read and written by many lanes at once."""

    what = ""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)  # NaN, where nothing is written
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.shadow = Shadow(self.bytes.size)

    def check(self, offset: Any, size: int, kind: str) -> None:
        wrong = offset % size != 0
        if wrong.any():
            raise Fault(
                f"misaligned {kind} of {size} bytes in {self.what}: {int(wrong.sum())} threads, "
                f"the first at byte {int(offset[wrong][0])}"
            )

    def read(self, offset: Any, size: int, n: int, place: Place | None) -> list[Any]:
        """n numbers of `size` bytes from each offset; place None: others may write meanwhile."""
        self.check(offset, size * n, "read")
        if place is not None:
            self.shadow.note(offset, size * n, place, False)
        first = offset // size
        return [self.views[size][first + i] for i in range(n)]

    def write(self, offset: Any, size: int, values: list[Any], place: Place) -> None:
        self.check(offset, size * len(values), "write")
        first, view = offset // size, self.views[size]
        # warps may write the same number to one place: Triton's reductions of replicated numbers do
        noted = np.logical_or.reduce([view[first + i] != v for i, v in enumerate(values)])
        noted |= self.shadow.writer[offset // GRANULE] == NOBODY
        if noted.any():
            its = Place(*(x[noted] for x in place))
            self.shadow.note(offset[noted], size * len(values), its, True)
        for i, value in enumerate(values):
            view[first + i] = value
            if (view[first + i] != value).any():
                raise Fault(f"race: two threads write different numbers to one place: {self.what}")


class Shared(Space):
    """The shared memory of several blocks, one behind the other."""

    what = "shared memory"

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        super().__init__(self.stride * blocks)

    def check(self, offset: Any, size: int, kind: str) -> None:
        super().check(offset, size, kind)
        if self.stride == 0 or (offset % self.stride + size > self.size).any():
            raise Fault(f"{kind} of {size} bytes past the end of {self.size} of shared memory")


class Region(NamedTuple):
    name: str
    start: int
    stop: int
    storage: Any


def _bytes(storage: Any) -> Any:
    whole = torch.empty(0, dtype=torch.uint8)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


class Global(Space):
    """A copy of the storages of a launch's tensors, with gaps that nobody may touch."""

    what = "global memory"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.regions: dict[int, Region] = {}
        at = GAP
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            known = self.regions.get(storage.data_ptr())
            if known is not None:
                self.regions[storage.data_ptr()] = known._replace(name=f"{known.name}+{name}")
            elif storage.nbytes():
                # as far from a boundary as it lies in the process
                start = -(-at // 256) * 256 + storage.data_ptr() % 256
                at = start + storage.nbytes() + GAP
                region = Region(name, start, start + storage.nbytes(), storage)
                self.regions[storage.data_ptr()] = region
        super().__init__(at)
        ordered = list(self.regions.values())
        self.names = [region.name for region in ordered]
        self.starts = np.array([region.start for region in ordered], np.int64)
        self.stops = np.array([region.stop for region in ordered], np.int64)
        for region in ordered:
            self.bytes[region.start : region.stop] = _bytes(region.storage)
        # (region, "read" or "write") -> sectors, requests; requests of each sector
        self.sectors: Counter[tuple[str, str]] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        sectors = self.bytes.size // SECTOR + 1
        self.touched = {kind: np.zeros(sectors, np.int32) for kind in ("read", "write")}

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        region = self.regions.get(storage.data_ptr())
        # a tensor without elements: whatever is read there is out of bounds
        return BASE + (
            64 if region is None else region.start + tensor.data_ptr() - region[3].data_ptr()
        )

    def write_back(self) -> None:
        for region in self.regions.values():
            _bytes(region.storage)[:] = self.bytes[region.start : region.stop]

    def check(self, offset: Any, size: int, kind: str) -> None:
        super().check(offset, size, kind)
        region = np.searchsorted(self.starts, offset, "right") - 1
        outside = (region < 0) | (offset + size > self.stops[np.maximum(region, 0)])
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            near = max(int(region[i]), 0)
            raise Fault(
                f"{kind} of {size} bytes outside of a tensor: {int(outside.sum())} threads, the "
                f"first at byte {int(offset[i] - self.starts[near])} of the "
                f"{int(self.stops[near] - self.starts[near])} bytes of {self.names[near]}"
            )

    def count(self, offset: Any, warp: Any, kind: str) -> None:
        """Adds an access's requests (one a warp) and the sectors that each takes.

        An aligned access of at most 16 bytes lies within one sector.
        """
        sector = offset // SECTOR
        stride = self.bytes.size // SECTOR + 1
        pairs, of = np.divmod(np.unique(warp * stride + sector), stride)  # the warp of each sector
        np.add.at(self.touched[kind], of, 1)
        warps, first = np.unique(warp, return_index=True)
        region = np.searchsorted(self.starts, offset[first], "right") - 1
        share = np.bincount(np.searchsorted(warps, pairs), minlength=warps.size)
        for r in np.unique(region):
            here = region == r
            self.requests[self.names[r], kind] += int(here.sum())
            self.sectors[self.names[r], kind] += int(share[here].sum())

    def loops(self, name: str, kind: str) -> list[int]:
        """Sectors of a region that were touched at least once, twice, ...: those of each loop."""
        region = next(region for region in self.regions.values() if region.name == name)
        times = self.touched[kind][region.start // SECTOR : -(-region.stop // SECTOR)]
        return [int((times > i).sum()) for i in range(times.max(initial=0))]
