"""Backends that write a YAML file for a job in a container, which a person then submits."""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from cluster.jobs.backend import Job, JobBackend, Place
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError

_QUANTITY = re.compile(r"(\d+)([GT])i?")


class JobFileBackend(JobBackend):
    """A backend for container images. Its jobs use `submit.volume` for the runs and the cache."""

    file_name: ClassVar[str]
    """Name of the file in the run's `submit/`."""
    secret_name: ClassVar[re.Pattern[str]]
    """Pattern that each name in `submit.secrets` must match completely."""

    @abstractmethod
    def render(self, job: Job) -> str:
        """Return the content of the file as YAML.

        Raises:
            SchedulerError: If the job's command cannot be passed on unchanged.
        """

    @abstractmethod
    def submit_command(self, config: SubmitConfig, path: Path) -> str:
        """Return the shell command that submits the file at `path`."""

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check the image, its command, the volume, the secrets' names and the memory."""
        for name in ("image", "volume"):
            if not getattr(config, name):
                raise ConfigError(
                    f"submit.{name}",
                    getattr(config, name),
                    f"a name, as {config.scheduler} needs one",
                )
        if not config.launch:
            raise ConfigError(
                "submit.launch", [], "the command in the image, such as [python,/app/launch.py]"
            )
        check_quantity("submit.mem", config.mem)
        if not config.mount.startswith("/"):
            raise ConfigError("submit.mount", config.mount, "an absolute path")
        for secret in config.secrets:
            if not self.secret_name.fullmatch(secret):
                # The value is masked: it may be a secret that was given instead of its name.
                raise ConfigError(
                    "submit.secrets",
                    "***",
                    f"names that match {self.secret_name.pattern}, not the values of the secrets",
                )

    def place(self, config: SubmitConfig) -> Place:
        """Return `Place.CONTAINER`."""
        return Place.CONTAINER

    def text(self, job: Job) -> str:
        """Return the whole text of the file: the command that wrote the file, then the YAML."""
        command = f"python launch.py stage=submit submit={job.config.scheduler} name={job.name}"
        return f"# Written by `{command}`.\n{self.render(job)}"

    def hand_over(self, job: Job) -> list[str]:
        """Write the file, and return the command that submits it."""
        path = job.folder / self.file_name
        path.write_text(self.text(job), encoding="utf-8")
        return [
            f"submit: wrote {path}; nothing has been submitted yet",
            f"submit it with: {self.submit_command(job.config, path)}",
        ]


def check_quantity(key: str, value: str | None) -> None:
    """Check an amount of memory, unless it is None.

    Raises:
        ConfigError: If the amount is not a whole number of Gi, G, Ti or T.
    """
    if value is not None and not _QUANTITY.fullmatch(value):
        raise ConfigError(key, value, "a whole number of Gi, G, Ti or T, such as 64Gi")


def gigabytes(quantity: str) -> int:
    """Return the number of gigabytes in a container memory quantity such as `64Gi`."""
    found = _QUANTITY.fullmatch(quantity)
    assert found is not None, "validated"
    return int(found[1]) * (1024 if found[2] == "T" else 1)


def dns_name(name: str) -> str:
    """Convert a run's name to lower-case letters, digits and dashes, starting with a letter."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return short if short[:1].isalpha() else f"run-{short}".strip("-")
