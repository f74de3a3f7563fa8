"""Part `waits`: how often the host waits for the device in a step, and where the time goes."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.part import Context, Row, work_row
from benchmarks.harness.timing import interleaved
from benchmarks.step.ours import Variant, engine_name, make_step
from benchmarks.step.work import Call, Inputs

VARIANTS = (
    Variant("step + clip", clip=True),
    Variant("step + clip + auxk on 1/8 rows", clip=True, auxk_rows=1 / 8),
)
_TOP = 25
_FRAMES = 12


def run(context: Context) -> str:
    """Profile steps and count their host waits, with and without the auxiliary loss."""
    work = context.shapes.steps["A"]
    said = []
    for variant in VARIANTS:
        step = make_step(Inputs(work, context.setup), variant)
        for _ in range(2):  # compile, and allocate the optimiser's state
            step()
        context.setup.synchronize()
        notes = {"work": work_row(context, work), "variant": variant.op, "engine": engine_name()}
        busy = _profile(context, step, notes)
        waits = _count_waits(context, step, notes)  # last, because it ends a step in the middle
        said.append(f"{variant.op}: {waits} host waits, device busy {busy}")
    return "; ".join(said)


def _count_waits(context: Context, step: Call, notes: Row) -> str:
    """Report the waits of one step and their places; see `torch.cuda.set_sync_debug_mode`.

    Explicit calls of `torch.cuda.synchronize` are not found by this mode.
    """
    if not context.on_cuda:
        context.report("host waits", **notes, skipped="needs a CUDA device")
        return "?"
    places = sync_warnings(step, torch.cuda.set_sync_debug_mode)
    count = sum(places.values())
    context.report(
        "host waits",
        **notes,
        count=count,
        places=dict(places),
        first=_first_wait(step) if count else None,
        passed=not count,
    )
    return str(count)


def sync_warnings(step: Call, set_mode: Callable[[str], None]) -> Counter[str]:
    """Run a step and return where it warned of a wait, as "file:line" -> number of warnings.

    Args:
        step: The step.
        set_mode: `torch.cuda.set_sync_debug_mode`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_mode("warn")
        try:
            step()
        finally:
            set_mode("default")
    return Counter(
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )


def _first_wait(step: Call) -> list[str]:
    """Return the innermost frames of the first wait of a step.

    The step ends there, so its state is unusable afterwards. Waits of the backward pass are
    reported by `sync_warnings` at the call of `backward` only; here, the frames are its own.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-_FRAMES:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def _profile(context: Context, step: Call, notes: Row) -> str:
    """Report the kernels with the largest device time; return the share of a step's time."""
    n_steps = context.shapes.profiled_steps
    timing = interleaved(
        {"": step}, rounds=n_steps, warmup=1, synchronize=context.setup.synchronize
    )[""]
    activities = [ProfilerActivity.CPU]
    if context.on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for _ in range(n_steps):
            step()
        context.setup.synchronize()
    kernels = device_times(found.key_averages(), context.on_cuda)
    total_s = sum(seconds for _, seconds, _ in kernels) / n_steps
    top = [
        {"name": name, "calls_per_step": calls / n_steps, "seconds_per_step": seconds / n_steps}
        for name, seconds, calls in kernels[:_TOP]
    ]
    launches = sum(calls for _, _, calls in kernels) / n_steps
    context.report(
        "profile",
        **notes,
        median_s=timing.median_s,
        device_s=total_s,
        launches=launches,
        kernels=top,
    )
    return f"{100 * total_s / timing.median_s:.0f}%"


def device_times(events: Any, on_cuda: bool) -> list[tuple[str, float, int]]:
    """Return (name, seconds, calls) of the events of a profile, longest first.

    Args:
        events: `key_averages()` of a profile.
        on_cuda: Count time on the device; otherwise, time on the CPU.
    """
    rows = []
    for event in events:
        if on_cuda and event.device_type.name != "CUDA":
            continue  # the operator that launched the kernel; its time is the kernel's
        name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        seconds = getattr(event, name) / 1e6
        if seconds > 0:
            rows.append((event.key, seconds, event.count))
    return sorted(rows, key=lambda row: -row[1])
