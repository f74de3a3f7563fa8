"""Test the files for KubeRay and SkyPilot: reviewed golden files and required settings.

`python -m tests.unit.cluster.jobs.test_rendered_jobs` rewrites the golden files.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import SchedulerError
from cluster.jobs import kuberay
from cluster.jobs.backend import BACKENDS, Job
from cluster.jobs.job_file import gigabytes
from cluster.jobs.kuberay import KUBERAY
from cluster.jobs.skypilot import SKYPILOT
from conf.schema.submit import SubmitConfig
from foundation.errors import ConfigError
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
COMMAND = ["python", "/app/launch.py", "cluster=join", "name=Big.1", "data.path=my text.txt"]
COMMON: dict[str, Any] = {
    "image": "registry.example/latent-foundry:gpu",
    "launch": COMMAND[:2],
    "nodes": 2,
    "gpus_per_node": 8,
    "cpus_per_task": 32,
    "mem": "256Gi",
    "volume": "runs-claim",
    "max_requeues": 10,
}
ON_KUBERAY = SubmitConfig(
    scheduler="kuberay", gpu="NVIDIA-H100-80GB-HBM3", secrets=["wandb"], namespace="sae", **COMMON
)
ON_SKYPILOT = SubmitConfig(
    scheduler="skypilot", gpu="H100", secrets=["WANDB_API_KEY"], spot=True, **COMMON
)


def job(config: SubmitConfig, name: str = "Big.1", command: list[str] = COMMAND) -> Job:
    return Job(name, Path(name), command, config, 120.0)


def rendered() -> dict[str, str]:
    backends = ((KUBERAY, ON_KUBERAY), (SKYPILOT, ON_SKYPILOT))
    return {backend.file_name: backend.text(job(config)) for backend, config in backends}


@pytest.fixture(autouse=True)
def fixed_ray_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuberay, "version", lambda package: "2.60.0")


@pytest.mark.parametrize("name", ["rayjob.yaml", "skypilot.yaml"])
def test_golden(name: str) -> None:
    KUBERAY.check(ON_KUBERAY, grace_s=120)
    SKYPILOT.check(ON_SKYPILOT, grace_s=120)
    assert rendered()[name] == (GOLDEN / name).read_text()


def test_a_rayjob_has_time_to_save_and_is_removed_when_done() -> None:
    ray_job = yaml.safe_load(rendered()["rayjob.yaml"])
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    spec = ray_job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 10
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    for group in (cluster["headGroupSpec"], workers):
        # KubeRay's schema requires strings here, but YAML reads a bare 0 as a number.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 120
        (container,) = pod["containers"]
        assert all(isinstance(value, str) for value in container["resources"]["limits"].values())
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} == {"runs", "shm"}
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert "nvidia.com/gpu" not in str(cluster["headGroupSpec"])
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 120


def test_the_script_of_a_sky_node_is_valid_shell_and_quotes_words() -> None:
    task = yaml.safe_load(rendered()["skypilot.yaml"])
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert "'data.path=my text.txt'" in task["run"]
    assert task["secrets"] == {"WANDB_API_KEY": None, "RAY_AUTH_TOKEN": None}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    alone = SubmitConfig(**{**vars(ON_SKYPILOT), "nodes": 1})
    task = yaml.safe_load(SKYPILOT.render(job(alone)))
    assert task["run"].startswith("exec python") and "ray start" not in task["run"]
    assert SKYPILOT.joins_ray(ON_SKYPILOT) and not SKYPILOT.joins_ray(alone)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image": None}, "submit.image=None"),
        ({"volume": None}, "submit.volume=None"),
        ({"launch": []}, "submit.launch"),
        ({"mem": "64 GB"}, "submit.mem='64 GB'"),
        ({"mem": "65536Mi"}, "submit.mem='65536Mi'"),
        ({"mount": "runs"}, "an absolute path"),
        ({"secrets": ["WANDB_API_KEY=abc"]}, r"submit.secrets='\*\*\*'"),
        ({"namespace": "A b"}, "submit.namespace"),
        ({"cpus_per_task": None}, "submit.cpus_per_task"),
        ({"setup": ["module load cuda"]}, "submit.setup"),
        ({"scheduler": "ray", "address": "head:8265"}, "submit.address"),
        ({"scheduler": "skypilot", "gpus_per_node": None, "secrets": []}, "submit.gpu="),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any], expected: str) -> None:
    config = SubmitConfig(**{**vars(ON_KUBERAY), **change})
    with pytest.raises(ConfigError, match=expected):
        BACKENDS[config.scheduler].check(config, grace_s=120)


@pytest.mark.parametrize("word", ["data.path=a;b", "data.path=${runs_dir}/t", "name='x'", "a|b"])
def test_a_rayjob_refuses_words_that_a_shell_would_change(word: str) -> None:
    with pytest.raises(SchedulerError, match=r"no characters that a shell interprets"):
        KUBERAY.render(job(ON_KUBERAY, command=[*COMMAND, word]))


@pytest.mark.parametrize("name", ["1m_latents", "Big.1", "-", "x" * 80])
def test_names_begin_with_a_letter_and_are_short(name: str) -> None:
    metadata = yaml.safe_load(KUBERAY.render(job(ON_KUBERAY, name)))["metadata"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,35}[a-z0-9])?-", metadata["generateName"])
    task = yaml.safe_load(SKYPILOT.render(job(ON_SKYPILOT, name)))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", task["name"])


def test_memory_keeps_its_unit() -> None:
    assert [gigabytes(text) for text in ("256Gi", "64G", "1Ti")] == [256, 64, 1024]


def test_the_command_writes_a_file_and_says_how_to_submit_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch.py"), "stage=submit", "submit=kuberay"),
            *("submit.image=an/image", "submit.volume=claim", "name=k", "sae.k=16"),
            f"cache_dir={tmp_path}",
            f"runs_dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "k" / "submit" / "rayjob.yaml"
    assert f"kubectl create -f {path}" in done.stdout
    assert yaml.safe_load(path.read_text())["spec"]["entrypoint"] == (
        "python /app/launch.py cluster=join sae.k=16 stage=pipeline name=k runs_dir=/runs "
        "cache_dir=/runs/.cache"
    )
    assert not (tmp_path / "k" / "config.yaml").exists()  # the run folder is on the cluster


if __name__ == "__main__":
    for file, text in rendered().items():
        (GOLDEN / file).write_text(text)
