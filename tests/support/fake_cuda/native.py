"""Compile and load the fake CUDA device of `device.cpp`. Does not import torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
_TORCH_LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")


def compiler() -> str | None:
    """Return the C++ compiler: the environment variable CXX, else c++ or g++; None if missing."""
    names = (os.environ.get("CXX"), "c++", "g++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def missing() -> str | None:
    """Return why the fake device does not run here, or None if it does."""
    if version("torch").partition("+")[2].startswith(("cu", "rocm")):
        return "this build of torch has a real CUDA device; the fake one needs a CPU build"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if compiler() is None:
        return "no C++ compiler found: install g++, or set CXX"
    return None


def build() -> Path:
    """Return the compiled library; compiles it once for each source and version of torch.

    The library is cached in the user's cache folder, outside the repository.

    Raises:
        RuntimeError: If the compiler fails; the message ends with its output.
    """
    key = f"{version('torch')}\n{compiler()}\n{SOURCE.read_text()}".encode()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(root) / "latent-foundry" / f"fake_cuda-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    torch = _torch_folder()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [
            str(compiler()),
            *("-std=c++20", "-O0", "-w", "-fPIC", "-shared"),
            *(f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"),
            *(str(SOURCE), "-o", str(made)),
            *(f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cannot compile {SOURCE}: {done.stderr[-2000:]}")
        os.replace(made, library)  # several test processes may compile at once
    return library


def load() -> ctypes.CDLL:
    """Load the library, then check that torch uses it.

    Raises:
        RuntimeError: If torch was imported before.
    """
    path = build()
    for name in _TORCH_LIBRARIES:
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    for function in (library.fake_cuda_current_stream, library.fake_cuda_exchange_stream):
        function.restype = ctypes.c_int64
    library.fake_cuda_exchange_stream.argtypes = [ctypes.c_int64]
    library.fake_cuda_host_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.fake_cuda_host_unregister.argtypes = [ctypes.c_void_p]
    library.fake_cuda_is_installed.restype = ctypes.c_bool
    library.fake_cuda_install()
    if not library.fake_cuda_is_installed():
        raise RuntimeError("torch was imported before the fake CUDA device was loaded")
    return library


def _torch_folder() -> Path:
    found = find_spec("torch")
    assert found is not None and found.origin is not None, "torch is not installed"
    return Path(found.origin).parent
