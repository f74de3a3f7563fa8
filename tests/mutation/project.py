"""Mutations of files in the root folder.

If several tests fail without a protection, the fastest one is listed.
"""

from __future__ import annotations

from tests.mutation.mutation import one_edit

MUTATIONS = (
    one_edit(
        20,
        "Ray's token gets into the images",
        ".dockerignore",
        "docker/ray_token\n",
        "",
        "tests/unit/test_docker.py::test_dockerignore_excludes_runs_and_secrets",
    ),
    one_edit(
        105,
        "a driver ignores signals during a harvest",
        "launch.py",
        "            on_preemption(raise_interrupted, config.checkpoint.grace_s),\n",
        "",
        "tests/fault/test_preemption.py::test_a_signal_while_it_harvests",
    ),
)
