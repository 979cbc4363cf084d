"""What a card can do, by its data sheet: nothing here is a measurement of fastkd's.

`copy` is the exception, and an estimate: what a plain copy is expected to reach of the data sheet's
bandwidth. `make gpu` measures it in the run whose times it is held against.
"""

from __future__ import annotations

from typing import NamedTuple

MIB = 2**20


class Card(NamedTuple):
    """A card, its figures per second, and what limits the programs on a multiprocessor."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, sustained
    peak: float  # bytes/s of memory, data sheet
    copy: float  # bytes/s of a copy, ESTIMATED
    cache: int  # bytes of the last cache before memory
    special: int  # exp2, log2 or reciprocals a clock of one multiprocessor
    lanes: int  # instructions of one thread a clock of one multiprocessor
    warp: int
    registers: int  # of a multiprocessor, or (warp 64) of a lane of one of its four SIMDs
    threads: int  # of a multiprocessor
    note: str = ""

    @property
    def per_special(self) -> float:
        """Seconds per special-function operation of one thread, the whole card at work."""
        return 1.0 / (self.multiprocessors * self.clock * self.special)

    @property
    def per_instruction(self) -> float:
        """Seconds per instruction of one thread, the whole card at work."""
        return 1.0 / (self.multiprocessors * self.clock * self.lanes)

    def resident(self, registers: int, threads: int) -> int:
        """Programs of so many registers a thread and threads that share a multiprocessor."""
        held = -(-max(registers, 1) // 8) * 8
        if self.warp == 64:
            waves = 4 * min(8, self.registers // held)
            return max(1, waves * 64 // threads)
        return max(1, min(self.registers // (held * threads), self.threads // threads))


CARDS = {
    card.name: card
    for card in (
        Card(
            *("H200", "sm_90", 132, 1.755e9, 4.8e12, 4.3e12, 50 * MIB),
            *(16, 128, 32, 65536, 2048),
        ),
        Card(
            *("A100", "sm_80", 108, 1.41e9, 2.039e12, 1.75e12, 40 * MIB),
            *(16, 128, 32, 65536, 2048),
        ),
        Card(
            *("B200", "sm_100", 148, 1.85e9, 8.0e12, 7.0e12, 126 * MIB),
            *(16, 128, 32, 65536, 2048),
        ),
        Card(
            *("MI300X", "gfx942", 304, 2.1e9, 5.3e12, 4.2e12, 256 * MIB),
            *(16, 64, 64, 512, 2048),
            "its cache is the Infinity Cache, beyond 8 L2 caches of 4 MiB",
        ),
    )
}
BY_ARCH = {card.arch: card for card in CARDS.values()}
