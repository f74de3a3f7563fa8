"""Kill processes and nodes under the concurrent pipeline on a Ray cluster of several nodes.

A seed draws victims and moments. The run must end with the same weights as harvesting first and
training afterwards on one machine, and the store must contain every item once.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from activation_store import open_store, verify_store
from tests.fault.test_concurrent import CONCURRENT, command, final, run
from tests.support.injection import Injector, ray_nodes, wait_for_step
from tests.support.tiny_models import save_gpt2, write_text

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(900),  # four full starts, about 90 s on an idle machine
]

SEED = 11
SMALL = ("parallel.latent=2", "train.batch_tokens=16", "checkpoint.every_tokens=640")
STEPS = 560
PATIENCE_S = 400
SHARDS = "store/transformer.h.1/c.*"


def test_faults_on_several_nodes_change_nothing(tmp_path):
    save_gpt2(tmp_path / "model")
    write_text(tmp_path / "text.txt", documents=700)
    for stage in ("harvest", "train"):
        run(tmp_path, "calm", *SMALL, f"stage={stage}")
    folder = tmp_path / "struck" / "run"
    with ray_nodes(3, cpus=1) as nodes, open(tmp_path / "log", "w+") as log:
        address = f"cluster.address={nodes.address}"
        cluster = ("cluster=join", address, "cluster.harvest_workers=2", "cluster.max_failures=8")
        limits = ("train.timeout_s=120", "cluster.placement_timeout_s=60")
        argv = command(tmp_path, "struck", *SMALL, *CONCURRENT, *cluster, *limits)

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(argv, stdout=log, stderr=log)

        process = start()
        injector = Injector(folder, SEED, nodes)
        step = 0
        for kind in injector.random.sample(["worker", "rank", "node", "driver"], 4):
            step += injector.random.randrange(30, 90)
            wait_for_step(folder, step, process, PATIENCE_S)
            injector.strike(kind)
            if kind == "node":
                nodes.add()
            if kind == "driver":
                process.wait()
                process = start()
        assert process.wait(PATIENCE_S) == 0, Path(log.name).read_text() + str(injector.record)
        output = Path(log.name).read_text()
    print(injector.record)
    assert "train: resumed after" in output
    store = open_store(folder / "store")
    assert store.finalised and verify_store(folder / "store") == []
    for shard in sorted(tmp_path.glob(f"calm/run/{SHARDS}")):
        other = folder / "store" / "transformer.h.1" / shard.name
        assert shard.read_bytes() == other.read_bytes(), shard.name
    assert len(list(folder.glob(SHARDS))) == store.n_items
    expected, found = final(tmp_path, "calm", STEPS), final(tmp_path, "struck", STEPS)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
