"""Test the container files: linters, pinned versions, no root user, no secrets.

No image is built, because that needs a container engine. The commands of an image are those of
`make install`; the entrypoint script itself is run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
BIN = Path(sys.executable).parent
SECRET = re.compile(r"(?i)(token|secret|password|api_?key)\s*=")


def run_linter(name: str, *arguments: Path | str) -> None:
    linter = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert linter is not None, f"{name} not found; run pip install -e '.[dev]'"
    done = subprocess.run(
        [linter, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_linters_find_nothing() -> None:
    assert len(DOCKERFILES) == 2
    run_linter("hadolint", *DOCKERFILES)
    run_linter(
        "shellcheck",
        DOCKER / "entrypoint.sh",
        ROOT / "benchmarks" / "harness" / "make_peers_env.sh",
    )
    run_linter(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml"
    )


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_exists_pins_what_we_test_and_drops_root(path: Path) -> None:
    text = path.read_text()
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if line.startswith("COPY") and "--from=" not in line:
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line
        if "pip install" in line:
            for command in line.split("&&"):
                if "pip install" in command:
                    assert "--constraint" in command or "--no-deps" in command, command
    pins = (ROOT / "constraints.txt").read_text().split()
    assert set(re.findall(r"torch==[\d.]+", text)) <= set(pins)
    last_stage = joined[joined.rindex("\nFROM") :]
    users = re.findall(r"^USER (\S+)", last_stage, re.M)
    assert users and users[-1] not in ("0", "root")
    assert not SECRET.search(text)
    assert all(
        re.fullmatch(r"\S+:[\w.-]*\d[\w.-]*", base) for base in re.findall(r"FROM (\S+)", text)
    )


def test_dockerignore_excludes_runs_and_secrets() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", "runs", "docker/ray_token", ".env"} <= set(ignored)
    assert "docker/ray_token" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_nodes_share_runs_shared_memory_and_the_token() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert len(compose["services"]) == 3
    for service in compose["services"].values():
        assert service["volumes"] == ["runs:/runs"] and service["shm_size"]
        assert service["secrets"] == ["ray_token"]
        assert service["command"][0] in ("head", "worker")


def test_the_entrypoint_runs_the_given_command() -> None:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def entrypoint(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(DOCKER / "entrypoint.sh"), *arguments],
            env=environment | {"RAY_JOIN_TRIES": "1"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert "stage=STAGE" in entrypoint("launch", "--help").stdout
    refused = entrypoint("launch", "stage=nonsense")
    assert refused.returncode == 2 and "stage" in refused.stderr
    assert entrypoint("python", "-c", "print(6 * 7)").stdout == "42\n"
    missing = entrypoint("worker")
    assert missing.returncode != 0 and "HOST:PORT" in missing.stderr
    alone = entrypoint("worker", "127.0.0.1:1")
    assert alone.returncode == 1 and "no Ray head answers" in alone.stderr
