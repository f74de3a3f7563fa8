"""The environment of a run or measurement: hardware, package versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "deepspeed", "ray", "zarr", "tensorstore", "numpy", "transformers")
_HIDDEN = "***"
_SECRET_KEY = re.compile(
    r"(?is)^([\w.+~-]*(?:(?:auth|access|api|hf|bearer)[_-]?token|secret|passw(?:or)?d|api[_-]?key"
    r"|credential)s?=).+"
)
_USER_OF_URL = re.compile(r"(://)[^/@\s]+@")
_KNOWN_TOKEN = re.compile(r"\b(?:hf_|ghp_|sk-|AKIA)[A-Za-z0-9_-]{12,}")


def hardware() -> dict[str, Any]:
    """Return CPU, cores, memory and GPUs of this machine, but not its name or addresses."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect measurements."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of this checkout, or "unknown" outside git.

    The suffix `-dirty` means that tracked files have uncommitted changes.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def command() -> str:
    """Return the command line of this process, with `python` for the interpreter's path.

    Values that look like secrets are replaced by `***`.
    """
    return shlex.join(["python", *map(_without_secrets, sys.orig_argv[1:])])


def _without_secrets(argument: str) -> str:
    """Hide users in URLs, values of settings named after a secret, and known kinds of tokens."""
    argument = _SECRET_KEY.sub(rf"\1{_HIDDEN}", argument)
    argument = _USER_OF_URL.sub(rf"\1{_HIDDEN}@", argument)
    return _KNOWN_TOKEN.sub(_HIDDEN, argument)


def threads() -> int | None:
    """Return torch's number of threads per operation, or None if torch is not imported."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None


def environment() -> dict[str, Any]:
    """Return hardware, versions, commit and command of this process in one dictionary."""
    return {
        "hardware": {**hardware(), "threads": threads()},
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Return the size of this machine's memory, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    """Return the names of the GPUs that torch sees, or [] if torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
