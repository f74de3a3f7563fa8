"""Part `sanitizer`: compute-sanitizer on a small step, for bad accesses and races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from benchmarks.gpu.part import Context, Row
from cluster.run_folder.environment import ROOT

COMMAND = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
_FOUND = 99
"""Exit code that compute-sanitizer is asked to use if it finds an error."""
_TAIL = 4000
_CANNOT_RUN = ("Device not supported", "Unable to find", "failed to initialize")
"""Messages of a sanitizer that this machine does not support."""


def run(context: Context) -> str:
    """Run both tools in separate processes, each in a share of the time."""
    tool_path = shutil.which(COMMAND)
    if tool_path is None:
        context.report("compute-sanitizer", skipped=f"{COMMAND} is not on the PATH")
        return f"skipped: {COMMAND} is not on the PATH"
    said = []
    for place, tool in enumerate(TOOLS):
        row = _run_tool(context, tool_path, tool, context.budget.share(len(TOOLS) - place).left_s())
        said.append(f"{tool}: {row.get('errors', row.get('skipped'))}")
    return "errors: " + ", ".join(said)


def _run_tool(context: Context, tool_path: str, tool: str, limit_s: float) -> Row:
    command = [tool_path, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "10"]
    command += [sys.executable, "-m", "benchmarks.gpu.checks.small_step"]
    if context.interpreted:
        command.append("--interpret")
    # Without torch's allocator, every tensor is an allocation that the tool knows the end of.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(limit_s, 0.1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return context.report(tool, skipped=f"not finished after {limit_s:.0f} s")
    output = done.stdout + done.stderr
    if any(message in output for message in _CANNOT_RUN):
        return context.report(tool, skipped="cannot run here", output=output[-_TAIL:])
    errors = _errors(output)
    clean = done.returncode == 0 and not errors
    tail = None if clean else output[-_TAIL:]
    return context.report(tool, errors=errors, code=done.returncode, output=tail, passed=clean)


def _errors(output: str) -> int:
    """Return the number of errors and hazards in the tool's summary."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", output)
    return sum(int(number) for number in found)
