"""The process with the fake CUDA device: `python -m tests.support.fake_cuda.server FD`."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection

from tests.support.fake_cuda import native


def serve(connection: Connection) -> None:
    """Run the functions that the parent names, on the fake device, until it disconnects."""
    library = native.load()  # before anything imports torch
    from tests.support.fake_cuda import launches, torch_cuda

    device = torch_cuda.install(library)
    launches.install(device)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        module, _, function = name.partition(":")
        device.clear()
        try:
            reply = (True, getattr(import_module(module), function)(device, **arguments))
        except BaseException as error:
            reply = (False, (type(error).__name__, str(error), traceback.format_exc()))
        connection.send(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
