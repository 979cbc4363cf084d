"""Peak memory of a step above what was there before it.

On a GPU the allocator keeps the peak. On the CPU torch keeps none, and two methods see each what
the other misses: the profiler's record of every allocation by torch (exact, at any size, blind to
what a kernel takes from the system by itself), and the process's peak resident size, which Linux
lets a process reset (sees everything, but for smaller blocks it sees the C library's heap with its
leftovers and gaps). On large logits they agree, and there the larger one is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastkd.backends import buffer_pool

# glibc always takes larger blocks from the system and gives them back at once (its greatest
# DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
SYSTEM_BLOCK = 32 * 2**20
# Growth of the process below this is stacks and code pages, not data of a step.
RESIDENT_NOISE = 2**20


def peak_extra(step: Callable[[], object], device: torch.device, block: int) -> int:
    """Bytes at the peak of step() above those before it; what it returns counts.

    block: size of the tensors that it works with.
    """
    if device.type == "cpu":
        allocated = allocated_peak(step)
        resident = resident_peak(step) if block > SYSTEM_BLOCK else None
        if resident is not None and resident > allocated + RESIDENT_NOISE:
            return resident
        return allocated
    runtime = torch.get_device_module(device)
    runtime.synchronize(device)
    runtime.reset_peak_memory_stats(device)
    before = runtime.memory_allocated(device)
    kept = step()
    runtime.synchronize(device)
    del kept
    return int(runtime.max_memory_allocated(device) - before)


def allocated_peak(step: Callable[[], object]) -> int:
    """CPU: the peak of what torch's allocator handed out during step()."""
    buffer_pool.release()  # the step that fills it is the one to count
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = step()
    del kept
    # the public list of events sums allocations up by operator, which loses the peak
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_peak(step: Callable[[], object]) -> int | None:
    """CPU: growth of the process's peak resident size in step(); None where Linux is not."""
    buffer_pool.release()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak, see proc(5)
        before = _resident("VmHWM")
    except OSError:
        return None
    kept = step()
    after = _resident("VmHWM")
    del kept
    return after - before


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
