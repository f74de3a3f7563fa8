"""The process of one part: run it, and write its rows to a file while it runs.

    python -m benchmarks.gpu.child MODULE:FUNCTION --result FILE --seconds S [--rank] [--interpret]

A part has its own process because an illegal access on a GPU makes every later call of the process
fail, and because only ending a process reliably frees its device memory. SIGTERM prints the stacks
of all threads before the process ends, so that the parent's report says where a part was cut off.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.part import Context, error_text
from benchmarks.gpu.shapes import GPU, INTERPRETED
from foundation.errors import EXIT_FAILED
from foundation.registry import import_attribute

_ORPHAN_S = 30.0
"""Time after the end of its budget at which a part ends itself, because its parent must be dead."""
_OWN_SHARE = 0.9
"""Share of the time in which a part must end by itself; after all of it, the parent ends it."""


def main() -> int:
    """Run the part; return 0, or 1 if it raised an exception."""
    faulthandler.register(signal.SIGTERM, chain=True)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child")
    parser.add_argument("run", metavar="MODULE:FUNCTION")
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rank", action="store_true", help="start a process group of one rank")
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.seconds + _ORPHAN_S, exit=True)
    return run_part(options.run, options.result, options.seconds, options.rank, options.interpret)


def run_part(run: str, result: Path, seconds: float, needs_rank: bool, interpreted: bool) -> int:
    """Run one part in this process.

    Args:
        run: "module:function" of the part.
        result: File for its rows.
        seconds: Its time, counted from now.
        needs_rank: Start a process group of one rank.
        interpreted: Run tiny shapes on the CPU with Triton's interpreter.
    """
    until = time.monotonic() + _OWN_SHARE * seconds

    import torch
    import torch.distributed as dist

    from benchmarks.harness.one_rank import start_one_rank
    from benchmarks.step.measure import Budget
    from benchmarks.step.work import Setup

    setup = Setup.of("cuda")
    if interpreted:
        # The interpreter takes CPU tensors, and float16 instead of bfloat16.
        setup = Setup(torch.device("cpu"), "triton", torch.float16)
    shapes = INTERPRETED if interpreted else GPU
    context = Context(setup, shapes, Budget(until), interpreted, result)
    try:
        torch.manual_seed(0)
        if needs_rank:
            start_one_rank(setup.device.type)
        summary = import_attribute(run)(context)
        context.save(summary=summary)
    except Exception as error:  # reported by the parent; the next parts still run
        context.save(error=error_text(error), traceback=traceback.format_exc())
        return EXIT_FAILED
    if needs_rank:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
