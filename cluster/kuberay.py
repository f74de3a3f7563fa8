"""A run as a RayJob of KubeRay's: a Ray cluster of its own, which goes when the run is over."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import SchedulerError
from cluster.submit_config import SubmitConfig
from cluster.submitted import dns_name

_AFTER_GRACE_S = 30
"""For Ray's processes to end, once the last checkpoint is saved."""
_HEAD_CPUS, _HEAD_MEMORY = 4, "16Gi"
_NOT_PLAIN = re.compile(r"[$`\"'\\&|;<>()*?#~!\n]")


def submit_command(_config: SubmitConfig, path: Path) -> str:
    """What submits the file."""
    return f"kubectl create -f {shlex.quote(str(path))}"


def render(config: SubmitConfig, name: str, command: list[str], grace_s: float) -> str:
    """The RayJob, as YAML.

    Args:
        config: of the job.
        name: of the run.
        command: the driver's, in the image.
        grace_s: seconds that the run takes for its last checkpoint (`checkpoint.grace_s`).

    Raises:
        SchedulerError: KubeRay could not pass the command on.
    """
    end_s = int(grace_s) + _AFTER_GRACE_S
    labels = {"app.kubernetes.io/name": "latent-foundry", "app.kubernetes.io/instance": _dns(name)}
    head = {"cpu": str(_HEAD_CPUS), "memory": _HEAD_MEMORY}
    node = {"cpu": str(config.cpus_per_task), "memory": str(config.mem)}
    if config.gpus_per_node:
        node["nvidia.com/gpu"] = str(config.gpus_per_node)
    worker_pod = _pod("ray-worker", config, node, end_s)
    if config.gpu:
        worker_pod["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": config.gpu}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            # Not `name`: a second submission of a run is a job of its own, and resumes it.
            "generateName": f"{_dns(name)}-",
            "namespace": config.namespace,
            "labels": labels,
        },
        "spec": {
            "entrypoint": shlex.join(_plain(command)),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "backoffLimit": config.max_requeues,
            "runtimeEnvYAML": yaml.safe_dump(
                {"env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(end_s)}}
            ),
            "rayClusterSpec": {
                "rayVersion": version("ray"),  # without it the operator refuses a token
                # The nodes know each other by a token that the operator makes.
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # The driver runs here; ranks and harvest workers do not.
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104
                    "template": _pod("ray-head", config, head, end_s),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "nodes",
                        "replicas": config.nodes,
                        "minReplicas": config.nodes,
                        "maxReplicas": config.nodes,
                        "rayStartParams": {},
                        "template": worker_pod,
                    }
                ],
            },
        },
    }
    header = f"# Of `python launch.py stage=submit submit=kuberay name={name}`.\n"
    return header + yaml.safe_dump(job, sort_keys=False, width=100)


def _pod(container: str, config: SubmitConfig, resources: dict[str, str], end_s: int) -> Any:
    """Pod template whose one container may use `resources`, no less and no more."""
    return {
        "spec": {
            "terminationGracePeriodSeconds": end_s,
            "securityContext": {"fsGroup": 1000},  # the image's user may write to the volume
            "containers": [
                {
                    "name": container,
                    "image": config.image,
                    "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
                    "envFrom": [{"secretRef": {"name": secret}} for secret in config.secrets],
                    "resources": {"requests": dict(resources), "limits": dict(resources)},
                    "volumeMounts": [
                        {"name": "runs", "mountPath": config.mount},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": config.volume}},
                # Ray's object store and torch's workers; a container has 64 MB unless told.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shm}},
            ],
        }
    }


def _dns(name: str) -> str:
    """The name of a run as KubeRay allows names: a letter first, and room for what it appends."""
    return dns_name(name)[:36].strip("-")


def _plain(command: list[str]) -> list[str]:
    """Raises: SchedulerError: a word would not come through the two shells on the way."""
    for word in command:
        if _NOT_PLAIN.search(word):
            raise SchedulerError(
                f"{word!r}: expected no characters that a shell takes for more than themselves; "
                "KubeRay passes the command through two; put the value into the image's conf/"
            )
    return command
