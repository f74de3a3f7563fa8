"""Write a run as a managed job of SkyPilot, which runs it on a cloud or on Kubernetes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, ClassVar

import yaml

from cluster.jobs.backend import Job
from cluster.jobs.job_file import JobFileBackend, dns_name, gigabytes
from conf.schema.submit import SubmitConfig
from foundation.errors import EXIT_PREEMPTED, ConfigError

_TOKEN = "RAY_AUTH_TOKEN"
_PORT = 6390
"""Port of Ray's head. It differs from Ray's default 6379 and from 6380, because SkyPilot's runtime
is itself a Ray cluster."""
_NODES_TIMEOUT_S = 1200
"""Time limit for all nodes to join. Each node has to pull an image first."""


class SkyPilot(JobFileBackend):
    """Managed jobs of SkyPilot."""

    file_name: ClassVar[str] = "skypilot.yaml"
    secret_name: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check that the name and the number of the GPUs are either both set or both unset."""
        super().check(config, grace_s)
        if (config.gpu is None) != (config.gpus_per_node is None):
            raise ConfigError(
                "submit.gpu",
                config.gpu,
                "a value if and only if submit.gpus_per_node has one",
                "set both or neither",
            )

    def joins_ray(self, config: SubmitConfig) -> bool:
        """Return True if there are several nodes: the first node's script starts Ray's head."""
        return config.nodes > 1

    def submit_command(self, config: SubmitConfig, path: Path) -> str:
        """Return the `sky` command that submits the file.

        `sky` takes the values of secrets from the environment in which the command runs.
        """
        names = [f" --secret {name}" for name in config.secrets]
        token = f' --secret {_TOKEN}="$(openssl rand -hex 32)"' if config.nodes > 1 else ""
        return f"sky jobs launch{''.join(names)}{token} {shlex.quote(str(path))}"

    def render(self, job: Job) -> str:
        """Return the SkyPilot task as YAML."""
        return yaml.dump(_task(job), Dumper=_Dumper, sort_keys=False, width=100)


def _task(job: Job) -> dict[str, Any]:
    config = job.config
    resources: dict[str, Any] = {
        "image_id": f"docker:{config.image}",
        "use_spot": config.spot,
        "job_recovery": {
            "max_restarts_on_errors": config.max_requeues,
            "recover_on_exit_codes": [EXIT_PREEMPTED],
        },
    }
    if config.gpu:
        resources["accelerators"] = f"{config.gpu}:{config.gpus_per_node}"
    if config.cpus_per_task:
        resources["cpus"] = f"{config.cpus_per_task}+"
    if config.mem:
        resources["memory"] = f"{gigabytes(config.mem)}+"
    secrets = [*config.secrets, *([_TOKEN] if config.nodes > 1 else [])]
    task: dict[str, Any] = {
        "name": dns_name(job.name),
        "resources": resources,
        "num_nodes": config.nodes,
        "volumes": {config.mount: config.volume},
        "envs": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }
    if secrets:
        task["secrets"] = dict.fromkeys(secrets)
    task["run"] = _script(config, job.command, int(job.grace_s))
    return task


def _script(config: SubmitConfig, command: list[str], grace_s: int) -> str:
    """Return the script that every node runs. The first node starts Ray's head and the driver."""
    if config.nodes == 1:
        return "\n".join([*config.setup, f"exec {shlex.join(command)}", ""])
    start = "ray start --block --disable-usage-stats"
    python = shlex.quote(command[0])
    return "\n".join(
        [
            *config.setup,
            'head="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
            f'address="$head:{_PORT}"',
            "export RAY_AUTH_MODE=token",
            'if [ "$SKYPILOT_NODE_RANK" != 0 ]; then',
            '  until ray health-check --address "$address"; do sleep 2; done',
            f'  {start} --address="$address" || true  # returns when the head ends',
            "  exit 0",
            "fi",
            # Any failure here must end the job, because waiting nodes cost money.
            f'{start} --head --node-ip-address="$head" --port={_PORT} \\',
            "  --include-dashboard=false &",
            "ray_head=$!",
            # Do not use `ray stop`, because it would stop SkyPilot's own Ray too.
            "trap 'kill \"$ray_head\"' EXIT",
            f'timeout {_NODES_TIMEOUT_S} {python} -m cluster.jobs.slurm.ray_nodes wait "$address" '
            f"{config.nodes} || exit 1",
            f'{shlex.join(command)} cluster.address="$address" &',
            "driver=$!",
            "# A signal interrupts the first wait; the last checkpoint then takes up to "
            f"{grace_s} s.",
            "trap 'kill -TERM \"$driver\"' TERM",
            'wait "$driver"; code=$?',
            'if kill -0 "$driver" 2>/dev/null; then wait "$driver"; code=$?; fi',
            "exit $code",
            "",
        ]
    )


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes multi-line text as a literal block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


SKYPILOT = SkyPilot()
