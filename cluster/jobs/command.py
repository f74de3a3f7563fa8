"""The command that a job runs: the command that the user typed, adapted to where the job runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from activation_store.config import MixedStore
from cluster.errors import SchedulerError
from cluster.jobs.backend import JobBackend, Place
from cluster.run_folder.environment import ROOT
from conf.schema.data import MixedText
from conf.schema.run import RunConfig


def job_command(config: RunConfig, backend: JobBackend, overrides: list[str]) -> list[str]:
    """Return the command of the job's driver, which runs `submit.stage`.

    Args:
        config: Configuration of the run.
        backend: Backend that runs the job.
        overrides: Arguments from the command line.

    Raises:
        SchedulerError: If an argument would not work where the job runs.
    """
    submit = config.submit
    place = backend.place(submit)
    if place is Place.CONTAINER:
        arguments = _arguments_in_container(config, overrides)
    else:
        arguments = _arguments_on_shared_folders(config, place, overrides)
    if backend.joins_ray(submit) and not any(word.startswith("cluster=") for word in arguments):
        arguments = ["cluster=join", *arguments]
    here = [sys.executable, str(ROOT / "launch.py")]
    start = submit.launch or (here if place is Place.SAME_FOLDER else ["python", "launch.py"])
    return [*start, *arguments]


def _arguments_on_shared_folders(
    config: RunConfig, place: Place, overrides: list[str]
) -> list[str]:
    """Return the job's arguments for a job that sees this machine's folders."""
    paths = {"runs_dir": str(Path(config.runs_dir).expanduser().resolve())}
    if place is Place.OTHER_FOLDER:
        # Relative paths would not work. launch.py has already made these settings absolute if
        # they are paths.
        settings = {
            "cache_dir": config.cache_dir,
            "store.path": config.store.path,
            "data.path": config.data.path,
            "model.path": config.model.path,
        }
        paths |= {key: path for key, path in settings.items() if path.startswith("/")}
        mixtures: dict[str, Sequence[MixedStore | MixedText]] = {
            "store.mixture": config.store.mixture,
            "data.mixture": config.data.mixture,
        }
        paths |= {key: _entries(mixture) for key, mixture in mixtures.items() if mixture}
    kept = _without(
        overrides, "stage=", "name=", *_submit(overrides), *(f"{key}=" for key in paths)
    )
    paths = {key: text if key.endswith(".mixture") else _word(text) for key, text in paths.items()}
    added = {"stage": config.submit.stage, "name": config.name, **paths}
    return [*kept, *(f"{key}={value}" for key, value in added.items())]


def _entries(mixture: Sequence[MixedStore | MixedText]) -> str:
    """Return the entries of a mixture in Hydra's syntax, without the fields that are null."""
    entries = []
    for mixed in mixture:
        fields = {key: value for key, value in vars(mixed).items() if value is not None}
        words = (
            f"{key}:{_quoted(value) if isinstance(value, str) else value}"
            for key, value in fields.items()
        )
        entries.append(f"{{{','.join(words)}}}")
    return f"[{','.join(entries)}]"


def _word(text: str) -> str:
    """Return a path in Hydra's syntax, quoted if it has characters that are special to Hydra."""
    return text if re.fullmatch(r"[\w./:+@%-]+( [\w./:+@%-]+)*", text) else _quoted(text)


def _quoted(text: str) -> str:
    """Quote a string for Hydra, which unescapes only backslashes that precede a quote."""
    escaped = re.sub(r'(\\+)(?="|$)', r"\1\1", text).replace('"', '\\"')
    return f'"{escaped}"'


def _arguments_in_container(config: RunConfig, overrides: list[str]) -> list[str]:
    """Return the job's arguments for a container, with runs and caches on the mounted volume."""
    for override in overrides:
        if override.startswith("--config-dir="):
            raise SchedulerError(
                f"{override}: expected a config that is in the image; give its values on the "
                "command line, or add its files to conf/ of the image"
            )
    kept = _without(overrides, "stage=", "name=", "runs_dir=", "cache_dir=", *_submit(overrides))
    mount = config.submit.mount
    paths = [f"runs_dir={_word(mount)}", f"cache_dir={_word(f'{mount}/.cache')}"]
    return [*kept, f"stage={config.submit.stage}", f"name={config.name}", *paths]


def _submit(overrides: list[str]) -> tuple[str, ...]:
    """Return the prefixes of settings of the job, which its driver does not use.

    If another argument refers to one, all are kept.
    """
    return () if any("${submit." in override for override in overrides) else ("submit=", "submit.")


def _without(overrides: list[str], *prefixes: str) -> list[str]:
    """Return the overrides that begin with none of the prefixes."""
    return [override for override in overrides if not override.startswith(prefixes)]
