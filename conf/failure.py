"""Turn exceptions into a message for the user and an exit code."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from conf.schema.run import RunConfig
from conf.spelling import suggestion
from foundation.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED, FoundryError
from sae_core.architectures.registry import ARCHITECTURES

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_NOISE = (
    "object_type=",
    "reference_type=",
    "To append to",
    "Config search path",
    "provider=",
    "See https://hydra",
    "^",
    "1. To",
    "2. To",
    "3. To",
)
"""Prefixes of lines in Hydra's messages that do not help the user."""


def describe_error(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str | None, int]:
    """Return the message for the user and the exit code.

    The message is None for an unexpected exception. Its traceback should be shown instead.

    Args:
        error: The exception that ended the command.
        arguments: The arguments of the command line, for the correct spelling of a setting.
    """
    if getattr(error, "exit_code", None) == EXIT_PREEMPTED:
        what = "interrupted" if str(error) == "SIGINT" else f"preempted: {error}"
        return f"{what}; run the same command again to resume", EXIT_PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to resume", EXIT_FAILED
    if isinstance(error, HydraException | OmegaConfBaseException) or _raised_by_hydra(error):
        written = suggestion(arguments)
        remedy = f"; write {written}" if written else ""
        return f"error: {_config_message(error)}{remedy}", EXIT_BAD_INPUT
    if isinstance(error, FoundryError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        where = (
            error.filename or "a file in runs_dir, store.path, cache_dir or the temporary folder"
        )
        remedy = "; free space and run the same command again" if error.errno in _FULL else ""
        code = EXIT_BAD_INPUT if error.errno in _WRONG_PATH else EXIT_FAILED
        return f"error: {where}: {error.strerror}{remedy}", code
    return None, EXIT_FAILED


def _raised_by_hydra(error: BaseException) -> bool:
    """Return True if Hydra raised the error itself, such as ValueError for `model=null`."""
    frame = error.__traceback__
    if frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    module = str(frame.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def _config_message(error: BaseException) -> str:
    """Join the useful lines of Hydra's message into one, and suggest names for an unknown key."""
    lines = str(error).splitlines()
    if error.__cause__ is not None and str(error.__cause__) not in str(error):
        lines += str(error.__cause__).splitlines()
    kept = [line.strip().rstrip(".:") for line in lines]
    message = "; ".join(line for line in kept if line and not line.startswith(_NOISE))
    message = message.replace("LexerNoViableAltException: ", "could not read ")
    unknown = re.search(r"not in '(\w+)'; full_key: ([\w.]+)", message)
    if unknown:
        near = difflib.get_close_matches(unknown[2], _keys(_config_with(unknown[1])), n=2)
        message += f"; did you mean {' or '.join(near)}?" if near else ""
    return message


def _config_with(part: str) -> RunConfig:
    """Return a config with SAE settings of the class named `part`, or the default if none match."""
    for _, architecture in ARCHITECTURES.items():
        if architecture.settings.__name__ == part:
            return RunConfig(sae=architecture.settings())
    return RunConfig()


def _keys(config: object, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in vars(config).items():
        keys.append(f"{prefix}{name}")
        if hasattr(value, "__dataclass_fields__"):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
