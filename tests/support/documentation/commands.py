"""Check commands of the documentation without doing their work.

`launch.py` commands run launch.py in full, with stages that only record their config. Other
commands are parsed by their module's own parser, or printed by make.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import launch
from tests.support.documentation.pages import Block, PageError
from tests.support.paths import ROOT

_PRINTS_ONLY = ("--help", "--cfg")
_LAUNCHERS = ROOT / "conf" / "hydra" / "launcher"


def check_commands(block: Block, folder: Path) -> list[str]:
    """Check every command of a block; return one line per command that says how it was checked.

    Args:
        block: A shell block.
        folder: Scratch folder, used as the current folder.

    Raises:
        PageError: If a command is invalid or of an unknown kind.
    """
    done = []
    for words in block.commands:
        kind, name = words[0], Path(words[0]).name
        if name == "python" and Path(words[1]).name == "launch.py":
            stages = compose(words[2:], folder, block.where)
            done.append(f"composed and validated, stages {', '.join(stages) or 'none'}: {words}")
        elif name == "python" and words[1] == "-m":
            parse_module(words[2], words[3:], block.where)
            done.append(f"parsed by {words[2]}: {words}")
        elif name == "torchrun":
            parse_torchrun(words[1:], block.where)
            done.append(f"parsed by torchrun: {words}")
        elif kind == "make":
            print_targets(words[1:], block.where)
            done.append(f"printed by make -n: {words}")
        elif kind == "docker":
            check_docker(words[1:], folder, block.where)
            done.append(f"files and launch.py's arguments checked: {words}")
        else:
            raise PageError(f"{block.where}: unsupported command {words}")
    return done


def compose(arguments: Sequence[str], folder: Path, where: str) -> list[str]:
    """Run launch.py with stages that do nothing; return the stages that it would have run.

    Raises:
        PageError: If launch.py refuses the command.
    """
    arguments = [_basic_launcher(argument, where) for argument in arguments]
    ran: list[str] = []

    def recorded(module: str) -> Any:
        return SimpleNamespace(run=lambda *_: ran.append(module))

    @contextmanager
    def no_lock(config: Any, *_: Any) -> Iterator[Path]:
        yield folder / config.runs_dir / config.name

    messages = StringIO()
    with (
        patch.dict(os.environ),
        patch.object(sys, "argv", ["launch.py", *arguments]),
        patch.object(launch, "import_module", recorded),
        patch("cluster.run_folder.opening.open_run", no_lock),
        patch.object(launch, "_print_config", lambda config: None),
        _in_folder(folder),
        redirect_stderr(messages),
    ):
        try:
            launch.main()
        except SystemExit as end:
            if end.code:
                raise PageError(f"{where}: {messages.getvalue().strip()}") from end
    if not ran and not set(_PRINTS_ONLY) & set(arguments):
        raise PageError(f"{where}: launch.py ran no stage with {list(arguments)}")
    return ran


def _basic_launcher(argument: str, where: str) -> str:
    """Replace a launcher that starts other processes, after checking that its file exists."""
    key, _, value = argument.partition("=")
    if key != "hydra/launcher":
        return argument
    if not (_LAUNCHERS / f"{value}.yaml").is_file():
        raise PageError(f"{where}: {argument}: not found in conf/hydra/launcher")
    return "hydra/launcher=basic"


class _Parsed(BaseException):
    """Ends a module once its arguments have been parsed."""


def parse_module(module: str, arguments: Sequence[str], where: str) -> None:
    """Start a module and end it as soon as its parser has accepted the arguments.

    Raises:
        PageError: If the module does not exist, has no parser, or refuses the arguments.
    """
    if importlib.util.find_spec(module) is None:
        raise PageError(f"{where}: module {module} not found")
    if module == "pytest":
        missing = [word for word in arguments if not (ROOT / word).exists()]
        if missing:
            raise PageError(f"{where}: pytest {missing}: not found")
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(parser, *given, **named)
        raise _Parsed

    messages = StringIO()
    try:
        with (
            patch.object(sys, "argv", [module, *arguments]),
            patch.object(argparse.ArgumentParser, "parse_args", parse_and_end),
            redirect_stderr(messages),
        ):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except _Parsed:
        return
    except SystemExit as end:
        raise PageError(f"{where}: python -m {module}: {messages.getvalue()}") from end
    raise PageError(f"{where}: python -m {module} ended without parsing its arguments")


def parse_torchrun(arguments: Sequence[str], where: str) -> None:
    """Parse a torchrun command, and find the module that it starts.

    Raises:
        PageError: If torchrun refuses the arguments, or the module does not exist.
    """
    from torch.distributed.run import parse_args

    messages = StringIO()
    try:
        with redirect_stderr(messages):
            options = parse_args(list(arguments))
    except SystemExit as end:
        raise PageError(f"{where}: torchrun: {messages.getvalue()}") from end
    if not options.module or importlib.util.find_spec(options.training_script) is None:
        raise PageError(f"{where}: torchrun: module {options.training_script} not found")


def print_targets(targets: Sequence[str], where: str) -> None:
    """Let make print what the targets would do.

    Raises:
        PageError: If make has no such target.
    """
    command = ["make", "--dry-run", *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PageError(f"{where}: make: {done.stderr.strip()}")


def check_docker(arguments: Sequence[str], folder: Path, where: str) -> None:
    """Check the Dockerfile of `docker build -f`, and the settings of `docker run ... launch`.

    Raises:
        PageError: If the file is missing, launch.py refuses the settings, or the command is of
            another kind.
    """
    if arguments[0] == "build":
        file = arguments[arguments.index("-f") + 1]
        if not (ROOT / file).is_file():
            raise PageError(f"{where}: docker build -f {file}: not found")
    elif arguments[0] == "run" and "launch" in arguments:
        compose(arguments[arguments.index("launch") + 1 :], folder, where)
    else:
        raise PageError(f"{where}: unsupported command docker {list(arguments)}")


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
