"""The first run on a GPU: check the kernels, then measure, and compare with the predictions.

    python -m benchmarks.gpu [--minutes 20] [--json FILE] [--parts NAME ...]
    python -m benchmarks.gpu --interpret

Needs torch, triton and NumPy. Steps run through DeepSpeed, and checkpoints are those of the
trainer, where deepspeed and safetensors are installed. Each part has its own process, time and line
of result. The JSON is written again whenever there is something new, so that a run that is cut off
keeps what it has found. Without a GPU, `--interpret` runs the parts on the CPU at tiny sizes; its
times are meaningless.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from importlib.util import find_spec

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report.changes import changes
from benchmarks.gpu.report.compare import COLUMNS, comparison, device_of
from benchmarks.gpu.run import Outcome, Stop, run_parts
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.table import format_table, write_json
from foundation.errors import EXIT_FAILED


def main() -> int:
    """Run the command.

    Returns:
        Exit code: 0; 1 if a part failed or found something wrong; 2 if an option is invalid or
        there is no GPU; 128 and the signal's number if a signal stopped the run.
    """
    options = _options()
    try:
        parts = chosen(options)
    except BenchmarkError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return BenchmarkError.exit_code
    stop = Stop()

    def save(outcomes: list[Outcome]) -> None:
        if options.json:
            rows = comparison(outcomes, options.interpret)
            found = [asdict(outcome) for outcome in outcomes]
            needed = changes(outcomes, rows, options.interpret)
            notes = {"interpreted": options.interpret, "minutes": options.minutes}
            write_json(options.json, rows, parts=found, changes=needed, **notes)

    with stop.listening():
        outcomes = run_parts(parts, options.minutes, options.interpret, stop, save)
        save(outcomes)
    _print_end(outcomes, options.interpret)
    if stop.signal is not None:
        print(f"benchmarks.gpu: stopped by signal {stop.signal}", file=sys.stderr)
        return 128 + stop.signal
    return EXIT_FAILED if any(outcome.bad for outcome in outcomes) else 0


def chosen(options: argparse.Namespace) -> list[Part]:
    """Return the parts to run.

    Raises:
        BenchmarkError: If an option is invalid, or the machine lacks a GPU or triton.
    """
    if not options.minutes > 0:
        raise BenchmarkError(f"--minutes {options.minutes:g}: expected more than 0")
    names = [part.name for part in PARTS]
    unknown = sorted(set(options.parts or ()) - set(names))
    if unknown:
        raise BenchmarkError(f"--parts {' '.join(unknown)}: expected some of {' '.join(names)}")
    if find_spec("triton") is None:
        raise BenchmarkError("triton is not installed; run pip install triton")
    if not options.interpret:
        import torch

        if not torch.cuda.is_available():
            raise BenchmarkError(
                "torch found no CUDA device; run on a machine with an NVIDIA GPU, or use "
                "--interpret to run tiny sizes on the CPU"
            )
    return [part for part in PARTS if options.parts is None or part.name in options.parts]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all parts")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="NAME",
        help=f"run only these of: {', '.join(part.name for part in PARTS)}",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="run tiny sizes on the CPU in Triton's interpreter, to test this command",
    )
    return parser.parse_args()


def _print_end(outcomes: list[Outcome], interpreted: bool) -> None:
    rows = comparison(outcomes, interpreted)
    if rows:
        name = device_of(outcomes, interpreted)
        print(f"\npredicted and measured for {name}")
        print(format_table(rows, COLUMNS))
    if interpreted:
        print("\nTriton's interpreter ran the kernels: the times are meaningless.")
    needed = changes(outcomes, rows, interpreted)
    print("\nto change:" if needed else "\nto change: nothing found")
    for number, change in enumerate(needed, start=1):
        print(f"{number:3}. {change}")


if __name__ == "__main__":
    sys.exit(main())
