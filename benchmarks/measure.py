"""Time calls that take turns on a noisy machine, and measure the memory that one call adds."""

import ctypes
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import Case, Loss, loss_of, value_and_gradients

Call = Callable[[], object]
SHORTEST = 5e-3  # least seconds of a sample, far above the resolution of timer and scheduler
WARM_ROWS = 128


def use_threads(threads: int) -> None:
    """Set the number of threads, also for libraries with an OpenMP of their own that are loaded later."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def forward_backward(loss: Loss, case: Case) -> Call:
    """Return the call that is timed: loss and gradients on features of a case, drawn here."""
    return partial(value_and_gradients, loss, *case.features())


def seconds(call: Call, times: int, device: str) -> float:
    """Return the mean seconds of a call, of `times` in a row; on a GPU by its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def iterations(duration: float) -> int:
    """Return how many calls of this duration make a sample."""
    return max(1, math.ceil(SHORTEST / duration))


def interleaved(calls: dict[str, Call], repeats: int, device: str) -> dict[str, list[float]]:
    """Time all calls in turns: seconds by name and repeat. Each repeat runs every call, and begins with another one.

    A disturbance of the machine then hits all calls alike, and ratios within a repeat stay true. Run each call once
    before.
    """
    names = list(calls)
    times = {name: iterations(seconds(call, 1, device)) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(seconds(calls[name], times[name], device))
    return samples


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over repeats of samples / others, the ratio within a repeat."""
    return float(np.median(np.divide(samples, others)))


def available_bytes(device: str) -> float:
    """Return the free memory of the device in bytes; infinite if the system does not tell."""
    if device != "cpu":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of_call_mb(call: Call) -> float | None:
    """Return by how many MB (2^20 bytes) a call raises this process's peak of resident memory; None but on Linux.

    Linux keeps the peak (VmHWM) and resets it on request. Free memory that the allocator still holds is returned to the
    system first; otherwise its reuse would not show.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status_mb("VmRSS")
    call()
    return _status_mb("VmHWM") - before


def _peak_in_this_process(name: str, case: Case, threads: int) -> float | None:
    """Measure after a small call, which loads libraries, thread pools and code; a provider's own buffers still count.

    A compiled provider needs the exact shape in that first call.
    """
    use_threads(threads)
    small = case if name == "compile" else replace(case, batch=min(case.batch, WARM_ROWS))
    loss = loss_of(name, case)
    forward_backward(loss, small)()
    return peak_of_call_mb(forward_backward(loss, case))


def peak_extra_mb(name: str, case: Case, threads: int) -> float | None:
    """Return the MB that forward and backward take besides the inputs, gradients included; None if unknown.

    On the CPU each measurement has its own process, forked from one that has only imported torch. On a GPU the
    allocator counts.
    """
    if case.device != "cpu":
        call = forward_backward(loss_of(name, case), case)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_this_process, name, case, threads).result()
