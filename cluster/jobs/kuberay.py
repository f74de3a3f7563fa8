"""Write a run as a KubeRay RayJob, with its own Ray cluster that is deleted after the run."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import yaml

from cluster.errors import SchedulerError
from cluster.jobs.backend import Job
from cluster.jobs.job_file import JobFileBackend, check_quantity, dns_name
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError

_AFTER_GRACE_S = 30
"""Seconds for Ray's processes to end after the last checkpoint is saved."""
_HEAD_CPUS = 4
_HEAD_MEMORY = "16Gi"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_NOT_PLAIN = re.compile(r"[$`\"'\\&|;<>()*?#~!\n]")


class KubeRay(JobFileBackend):
    """RayJobs of the KubeRay operator for Kubernetes."""

    file_name: ClassVar[str] = "rayjob.yaml"
    secret_name: ClassVar[re.Pattern[str]] = _LABEL

    def check(self, config: SubmitConfig, grace_s: float) -> None:
        """Check the settings of a pod: namespace, CPU cores, memory, and no setup lines."""
        super().check(config, grace_s)
        check_quantity("submit.shm", config.shm)
        if not _LABEL.fullmatch(config.namespace):
            raise ConfigError("submit.namespace", config.namespace, "a valid Kubernetes name")
        for name in ("cpus_per_task", "mem"):
            if getattr(config, name) is None:
                raise ConfigError(
                    f"submit.{name}", None, "a value", "set the CPU cores and memory of a node"
                )
        if config.setup:
            raise ConfigError(
                "submit.setup",
                config.setup,
                "no lines with submit=kuberay",
                "put the setup into the image",
            )

    def joins_ray(self, config: SubmitConfig) -> bool:
        """Return True: the operator starts a Ray cluster for the job."""
        return True

    def submit_command(self, config: SubmitConfig, path: Path) -> str:
        """Return the `kubectl` command that creates the RayJob."""
        return f"kubectl create -f {shlex.quote(str(path))}"

    def render(self, job: Job) -> str:
        """Return the RayJob as YAML."""
        return yaml.safe_dump(_ray_job(job), sort_keys=False, width=100)


def _ray_job(job: Job) -> dict[str, Any]:
    config = job.config
    end_s = int(job.grace_s) + _AFTER_GRACE_S
    labels = {
        "app.kubernetes.io/name": "latent-foundry",
        "app.kubernetes.io/instance": _dns(job.name),
    }
    head = {"cpu": str(_HEAD_CPUS), "memory": _HEAD_MEMORY}
    node = {"cpu": str(config.cpus_per_task), "memory": str(config.mem)}
    if config.gpus_per_node:
        node["nvidia.com/gpu"] = str(config.gpus_per_node)
    worker_pod = _pod("ray-worker", config, node, end_s)
    if config.gpu:
        worker_pod["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": config.gpu}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            # Use this instead of `name`, so that the file can be submitted again to resume the run.
            "generateName": f"{_dns(job.name)}-",
            "namespace": config.namespace,
            "labels": labels,
        },
        "spec": {
            "entrypoint": shlex.join(_plain(job.command)),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "backoffLimit": config.max_requeues,
            "runtimeEnvYAML": yaml.safe_dump(
                {"env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(end_s)}}
            ),
            "rayClusterSpec": {
                "rayVersion": version("ray"),  # the operator requires it for authentication
                # The nodes authenticate each other with a token that the operator creates.
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # The driver runs here; ranks and harvest workers do not.
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
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


def _pod(container: str, config: SubmitConfig, resources: dict[str, str], end_s: int) -> Any:
    """Return a pod template with one container whose resources are exactly `resources`."""
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
                # Ray's object store and torch's workers need more than the default 64 MB.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shm}},
            ],
        }
    }


def _dns(name: str) -> str:
    """Convert a run's name to a DNS label that is short enough for the suffixes KubeRay adds."""
    return dns_name(name)[:36].strip("-")


def _plain(command: list[str]) -> list[str]:
    """Return the command unchanged after checking that its words survive two shells.

    Raises:
        SchedulerError: If a word has characters that a shell interprets.
    """
    for word in command:
        if _NOT_PLAIN.search(word):
            raise SchedulerError(
                f"{word!r}: expected no characters that a shell interprets, because KubeRay passes "
                "the command through two shells; put the value into conf/ of the image"
            )
    return command


KUBERAY = KubeRay()
