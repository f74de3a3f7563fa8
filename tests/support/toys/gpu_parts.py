"""Parts of `benchmarks.gpu` that succeed, fail, hang, die, or find something wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.part import Context


def succeed(context: Context) -> str:
    """Report a passed check and a number that JSON cannot hold."""
    context.report("check", passed=True, ratio=float("nan"))
    return "all is well"


def find_wrong(context: Context) -> str:
    """Report a failed check."""
    context.report("check", passed=False)
    return "one is wrong"


def fail(context: Context) -> str:
    """Report a row, then raise an exception."""
    context.report("before")
    raise ValueError("toy failure\nin two lines")


def die(context: Context) -> str:
    """Report a row, then end the process as a crash would."""
    context.report("before")
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def hang(context: Context) -> str:
    """Report a row with the id of a child process, then wait forever, as does the child."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.report("before", child=sleeper.pid)
    time.sleep(600)
    return "never"
