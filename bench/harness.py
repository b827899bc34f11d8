"""What every bench shares: the clock, the peak of memory, the error and the gate before the clock.

`header` and `Rows` stand here for its users; they are written in machine.py and rows.py.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.machine import clocks as clocks
from bench.machine import header as header
from bench.rows import Rows as Rows
from bench.timing import Timing as Timing
from bench.timing import in_rounds
from videoswin_kernels.selection import UnavailableError

# Calls before the first that counts: on a GPU as many as 0.5 s take, so that clocks have risen.
WARM_CALLS = {"cuda": 3, "cpu": 1}
WARM_SECONDS = {"cuda": 0.5, "cpu": 0.0}
# A result that is further off than this is wrong, however wrong the naive result is.
CAP = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def attempt(
    make: Callable[[], tuple[Callable[[], object] | None, dict]], device: torch.device
) -> tuple[Callable[[], object] | None, dict]:
    """(the function to be timed, called once, and items of its row) as `make` returns them.

    Where that fails, None and the items that say why: "reason" for what cannot run here; "failed",
    with the exception under "fault", for anything else.
    """
    try:
        function, items = make()
        if function:
            function()
            if device.type == "cuda":
                # A fault of this provider shall show here, not as one of the next.
                torch.cuda.synchronize(device)
    except UnavailableError as refused:
        return None, {"reason": str(refused)}
    except Exception as fault:  # Whatever it is, the others shall be measured.
        if is_out_of_memory(fault):
            torch.cuda.empty_cache()
            return None, {"reason": "out of memory"}
        said = str(fault).strip().splitlines() or [""]
        return None, {"failed": f"{type(fault).__name__}: {said[0]}", "fault": fault}
    return function, items


def is_out_of_memory(fault: Exception) -> bool:
    """Whether it says that a device has no room, in torch's words or those of CUDA's libraries."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(fault, torch.OutOfMemoryError) or (
        isinstance(fault, RuntimeError) and any(word in str(fault) for word in words)
    )


def time_all(
    found: dict[str, tuple[Callable[[], object] | None, dict]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 6,
) -> dict[str, Timing]:
    """`measure` of what `attempt` found for each name.

    Where they have no room beside each other there are no times, and `found` says so of each.
    """
    functions = {name: function for name, (function, _) in found.items() if function}
    try:
        return measure(functions, device, seconds=seconds, least=least)
    except RuntimeError as fault:
        if not is_out_of_memory(fault):
            raise
    torch.cuda.empty_cache()
    said = "out of memory beside the others; --providers asks for it alone"
    found.update(dict.fromkeys(functions, (None, {"reason": said})))
    return {}


def measure(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    seconds: float = 2.0,
    least: int = 6,
    most: int = 500,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """How long each function takes, all of them under the same conditions.

    Each is entered twice, and all entries are called in shuffled rounds (bench/timing.py). On a GPU
    the time is that between two device events, from caches without their data, and without the time
    that the host needs to launch (unless the launches outgrow a queue, or the function waits for
    the device). On a CPU it is what the clock says.

    Args:
        functions: name -> what is timed; what it returns is dropped.
        device: where they run.
        seconds: how long all of them repeat in all, beyond warming up.
        least: rounds there are at least, however long they take; from six on noise is told.
        most: rounds there are at most.
        clock: seconds; a test's own in place of the monotonic one.
    """
    if not functions:
        return {}
    device = torch.device(device)
    clock = clock or time.perf_counter
    timer = _Events(device) if device.type == "cuda" else _Clock(clock)
    began, calls = clock(), 0
    while calls < WARM_CALLS[device.type] or clock() - began < WARM_SECONDS[device.type]:
        for function in functions.values():
            timer.warm(function)
        calls += 1
    began = clock()
    samples = in_rounds(
        functions,
        lambda name: timer.time(functions[name]),
        lambda count: count < most and (count < least or clock() - began < seconds),
    )
    return {
        name: Timing.of(*samples[name], timer.launch_ms.get(function))
        for name, function in functions.items()
    }


class _Clock:
    """Times a function of the CPU by a clock of seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        # Nothing is launched.
        self.launch_ms: dict[Callable[[], object], float] = {}

    def warm(self, function: Callable[[], object]) -> None:
        function()

    def time(self, function: Callable[[], object]) -> float:
        began = self.clock()
        function()
        return (self.clock() - began) * 1e3


class _Events:
    """Times a function of a GPU by device events.

    Before each repetition the device sweeps a buffer of four times its second-level cache. That
    leaves nothing of the last repetition there, and nothing to be written back during the next
    one, as what was swept last was only read. Then it waits as long as the slowest host needs to
    queue its launches: on an idle device the events would measure the host. More launches than a
    queue holds are not hidden so, and what the host takes is told beside the time.
    """

    # Of a wait, and cycles of a millisecond at the highest clock of any card at hand.
    MOST_MS, CYCLES = 200.0, 2_000_000

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.zeros(max(size, 2**24), dtype=torch.float32, device=device)
        self.launch_ms: dict[Callable[[], object], float] = {}
        # The first calls load the kernels of the sweep itself.
        for _ in range(3):
            self.sweep()

    def sweep(self) -> None:
        self.buffer.zero_()
        self.buffer.sum()

    def _between(self, function: Callable[[], object]) -> float:
        """Milliseconds of the device between the two ends of a function."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def warm(self, function: Callable[[], object]) -> None:
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        function()
        launch_ms = (time.perf_counter() - began) * 1e3
        # The first calls compile; the fastest of a few is what launching takes.
        self.launch_ms[function] = min(launch_ms, self.launch_ms.get(function, launch_ms))

    def time(self, function: Callable[[], object]) -> float:
        self.sweep()
        wait = min(1.2 * max(self.launch_ms.values()), self.MOST_MS)
        with torch.cuda.device(self.device):
            torch.cuda._sleep(int(wait * self.CYCLES))
        return self._between(function)


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """Bytes of tensors that a call needed beyond those held before it.

    On a CPU as torch's profiler sees them: what a library takes from the system is not among them,
    and what the call frees of those held before makes no room.
    """
    device = torch.device(device)
    if device.type != "cuda":
        # It logs its beginning and end of each call, in lines above any level that has a name.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            # What others left in cycles, and is freed now, would count for less of this call.
            gc.disable()
            try:
                function()
            finally:
                gc.enable()
        events = profiled.profiler.kineto_results.events()
        changes = [event for event in events if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        return max(accumulate((change.nbytes() for change in changes), initial=0))
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def largest(function: Callable[[int], object]) -> int:
    """The largest whole number that a function takes without running out of memory; 0 for none."""

    def fits(number: int) -> bool:
        try:
            function(number)
        except RuntimeError as fault:
            if not is_out_of_memory(fault):
                raise
            return False
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def error(got: Tensor | None, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in float64; infinite where it is no number, or got is missing."""
    if got is None or got.shape != exact.shape:
        return float("inf")
    exact = exact.detach().double()
    difference = (got.detach().to(exact.device).double() - exact).norm().item()
    size = exact.norm().item()
    if difference == 0:
        return 0.0
    ratio = difference / size if size else float("inf")
    return ratio if ratio == ratio else float("inf")


def gate(
    got: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor],
    naive: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> str | None:
    """What is wrong with a provider's results, in words that end a sentence; None if nothing is.

    The budget of each result: twice the error of the naive one in this dtype, and one rounding;
    and never more than `CAP`, so that the naive provider can be judged, too.

    Args:
        got: name -> result of the provider.
        exact: name -> the same in float64, for every name that is to be judged.
        naive: name -> what plain PyTorch gives in `dtype`.
        dtype: that of the calculation.
    """
    for name, truth in exact.items():
        rounding = torch.finfo(dtype).eps / 2
        allowed = min(2 * error(naive[name], truth) + rounding, CAP[dtype])
        off = error(got.get(name), truth)
        if not off <= allowed:
            return f"{name} is off by {off:.1e}, where {allowed:.1e} is allowed"
    return None
