"""The `Context` of a part of the command: its inputs, and how it reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import Shapes
from benchmarks.step.measure import Budget
from benchmarks.step.work import Setup
from foundation.atomic_files import write_json

Row = dict[str, Any]
_ERROR_CHARACTERS = 500


class Context:
    """The surroundings of one part: device, shapes, time, and the rows reported so far.

    Args:
        setup: Device, kernels and dtype.
        shapes: Sizes to measure.
        budget: Time of the part; its work must end by itself before that.
        interpreted: True if Triton's interpreter runs the kernels on the CPU.
        result: File that receives the rows.
    """

    def __init__(
        self, setup: Setup, shapes: Shapes, budget: Budget, interpreted: bool, result: Path
    ) -> None:
        self.setup = setup
        self.shapes = shapes
        self.budget = budget
        self.interpreted = interpreted
        self.rows: list[Row] = []
        self._result = result

    @property
    def on_cuda(self) -> bool:
        """True if the device is a GPU."""
        return self.setup.device.type == "cuda"

    def report(self, op: str, **values: Any) -> Row:
        """Add a row and write all rows to the result file, so that a cut-off keeps them.

        Args:
            op: Name of the measurement or check.
            values: Figures of the row. Checks have `passed`; what did not run has `skipped`, with
                the reason.
        """
        row = {"op": op, **values}
        self.rows.append(row)
        self.save()
        return row

    def save(self, **more: Any) -> None:
        """Write the rows to the result file again, with further keys next to them."""
        write_json(self._result, plain({"rows": self.rows, **more}))


def plain(value: Any) -> Any:
    """Return a value with NaN and infinities as text, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def error_text(error: BaseException) -> str:
    """Return the type and the text of an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_ERROR_CHARACTERS]


def work_row(context: Context, work: Any) -> Row:
    """Return the `work` of a row: sizes and dtype, as in the step benchmark."""
    return {**vars(work), "dtype": str(context.setup.dtype).removeprefix("torch.")}
