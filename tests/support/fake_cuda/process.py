"""Run functions in a process that has the fake CUDA device. Does not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from typing import Any

from tests.support.fake_cuda import native
from tests.support.paths import ROOT

_ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",  # asked for by DeepSpeed; nothing listens
    "DS_ACCELERATOR": "cuda",
    "OMP_NUM_THREADS": "1",
    "LATENT_FOUNDRY_TIME_ENCODER": "0",  # there are no times to measure
}


class DeviceError(Exception):
    """An error of a function that ran with the fake device.

    Args:
        kind: Name of the error's class.
        message: Its text.
        details: Its traceback.
    """

    def __init__(self, kind: str, message: str, details: str) -> None:
        super().__init__(f"{kind}: {message}\n{details}")
        self.kind = kind
        self.message = message


class FakeCudaProcess:
    """A process that runs functions with the fake device, one at a time.

    The device changes torch permanently, so it needs a separate process. It is started once,
    because importing torch and DeepSpeed takes seconds.
    """

    def __init__(self) -> None:
        native.build()
        self._connection, theirs = Pipe()
        environment = {**os.environ, **_ENVIRONMENT}
        environment.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fake_cuda.server", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def run(self, function: str, **arguments: Any) -> Any:
        """Return `function(device, **arguments)`.

        Args:
            function: "module:name" of the function. Its first argument is the `FakeDevice`.
            arguments: Arguments that can be pickled.

        Raises:
            DeviceError: If the function raised an error.
        """
        self._connection.send((function, arguments))
        ok, result = self._connection.recv()
        if not ok:
            raise DeviceError(*result)
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait(timeout=60)
