"""Test signals during the start of Ray: not lost, and harmless to the processes Ray starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from cluster.preemption import signals_kept
from tests.support.paths import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
DRIVER = """
import os, signal, time
from cluster.preemption import Interrupted, on_preemption, raise_interrupted, signals_kept
try:
    with on_preemption(raise_interrupted, 60):
        with signals_kept():
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
except Interrupted as name:
    print(name)
"""
RANK = """
import sys, threading, time
from cluster.preemption import on_preemption
print("up", flush=True)
sys.stdin.readline()
heard = threading.Event()
with on_preemption(lambda _: heard.set(), 60):
    deadline = time.monotonic() + 20
    while not heard.is_set() and time.monotonic() < deadline:
        time.sleep(0.02)
print("heard" if heard.is_set() else "lost", flush=True)
"""


def test_sigusr1_while_ray_starts_is_not_lost():
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "SIGUSR1\n", done.stderr


def test_processes_started_by_ray_survive_sigusr1_and_a_rank_receives_it():
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with signals_kept():
        rank = subprocess.Popen([sys.executable, "-c", RANK], env=ENVIRONMENT, **pipes)
    assert rank.stdout is not None and rank.stdout.readline() == "up\n"
    rank.send_signal(signal.SIGUSR1)  # before it has a handler
    time.sleep(0.2)
    assert rank.poll() is None
    assert rank.communicate("on\n", timeout=40)[0] == "heard\n"


IGNORED = """
import os, signal
from cluster.preemption import Interrupted, on_preemption, raise_interrupted
signal.signal(signal.SIGINT, signal.SIG_IGN if {ignored} else signal.default_int_handler)
try:
    with on_preemption(raise_interrupted, 60):
        os.kill(os.getpid(), signal.SIGINT)
    print("went on")
except Interrupted as name:
    print(name)
"""


@pytest.mark.parametrize(("ignored", "said"), [(True, "went on\n"), (False, "SIGINT\n")])
def test_ctrl_c_stops_a_run_unless_the_shell_ignores_it(ignored: bool, said: str) -> None:
    code = IGNORED.format(ignored=ignored)
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout == said, done.stderr
    assert ("press Ctrl-C again" in done.stderr) is not ignored
