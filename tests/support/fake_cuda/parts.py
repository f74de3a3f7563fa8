"""The parts of a run other than its steps, on the fake CUDA device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from activation_store import open_store
from activation_store.reading.buffers import anonymous
from benchmarks.gpu.checks import graph
from benchmarks.gpu.checks import resume as resume_part
from benchmarks.gpu.part import Context
from benchmarks.gpu.shapes import INTERPRETED
from benchmarks.step.measure import Budget
from benchmarks.step.ours import one_rank_mesh
from benchmarks.step.work import Setup
from cluster.training import store_source
from cluster.training.batch_order import BatchOrder
from cluster.training.mixture_source import MixtureSource
from cluster.training.shared_reads import SharedReads
from cluster.training.store_source import StoreSource
from sae_core import load_sae
from sae_core.architectures.registry import build_sae
from sae_core.checkpoint.host_copy import HostCopy, Staging
from sae_core.checkpoint.stored_sae import open_sae
from sae_core.inference_memory import plan_shards
from sae_core.kernels import get_kernels
from sae_core.sharded_inference import ShardedSAE
from sae_core.training.shared_source import SharedSource
from sae_core.training.trainer import Trainer
from tests.support.fake_cuda.cases import ANSWERS, BATCH, make_config, make_trainer, ranks
from tests.support.fake_cuda.mode import FakeDevice
from tests.support.fake_cuda.record import Record
from tests.support.store_cases import calibration, write_store

SMALL = {"n_latents": 4096, "k": 32, "auxk": 32}
"""An SAE whose checkpoint is small."""
D_SMALL = 128


def calibrate(device: FakeDevice, folder: str, answers: Mapping[str, int] = {}) -> Record:
    """Return the record of the calibration before a new run, at full size."""
    device.answers = ANSWERS | dict(answers)
    with ranks(device) as mesh:
        trainer = make_trainer(mesh, make_config({}, {}, {}), 4096, Path(folder))
        device.clear()
        trainer.calibrate()
        return device.clear()


def report(device: FakeDevice, folder: str, answers: Mapping[str, int] = {}) -> dict[str, Record]:
    """Return the records of adding a step's metrics, and of reducing them to a row."""
    device.answers = ANSWERS | dict(answers)
    with ranks(device) as mesh:
        config = make_config({}, {}, {"batch_tokens": BATCH})
        rows: list[dict[str, Any]] = []
        trainer = make_trainer(mesh, config, 4096, Path(folder), rows.append)
        x = torch.empty(BATCH, 4096, dtype=torch.bfloat16, device="cuda")
        out = trainer.engine.train_step(x, 0)
        device.clear()
        trainer._metrics.add(x, out)
        added = device.clear()
        trainer.step = 1
        trainer._clock.start()
        trainer._report()
        assert rows and rows[0]["mfu"] is not None
        return {"add": added, "reduce": device.clear()}


def write(folder: str, codec: str = "none", items: int = 6) -> str:
    """Write a store of `D_SMALL` columns and return its path."""
    path = Path(folder) / "store"
    arrays = {"acts": D_SMALL}
    write_store(
        path,
        [4096] * items,
        arrays=arrays,
        dtype="bfloat16",
        shard_tokens=4096,
        codec=codec,
        calibration=calibration(arrays),
    )
    return str(path)


def gather(
    device: FakeDevice, folder: str, codec: str = "none", pinned: bool = True
) -> dict[str, Any]:
    """Read batches from a store that are gathered on the device.

    Args:
        device: The fake device.
        folder: Folder of the store.
        codec: Codec of the store.
        pinned: Whether blocks are read into pinned memory, as they must be.

    Returns:
        `records`: one record for each batch; `dtype`: of the rows; `blocks`: for each batch, the
        number of blocks that were uploaded for it.
    """
    store = open_store(write(folder, codec))
    with device:
        pageable = patch.object(store_source, "pinned_on", lambda device: anonymous)
        with nullcontext() if pinned else pageable:
            source = StoreSource(store, "acts", BatchOrder(0, 512, 2, 4096), torch.device("cuda"))
        view = SharedSource(source, torch.device("cuda")).view()
        records, blocks = [], []
        assert source._device_rows is not None
        before: object = None
        for _ in range(24):
            device.clear()
            batch = view.next()
            records.append(device.clear())
            assert batch.x.device.type == "cuda" and batch.x.shape == (512, D_SMALL)
            block = source._device_rows._block
            blocks.append(int(block is not before))
            before = block
        source.close()
        return {"records": records, "dtype": str(batch.x.dtype), "blocks": blocks}


def _second_batch(device: FakeDevice, source: StoreSource | MixtureSource) -> Record:
    """Return the record of a source's second batch of 512 rows, and close the source."""
    view = SharedSource(source, torch.device("cuda")).view()
    view.next()
    device.clear()
    batch = view.next()
    assert batch.x.device.type == "cuda" and batch.x.shape == (512, D_SMALL)
    record = device.clear()
    source.close()
    return record


def host_gather(device: FakeDevice, folder: str) -> Record:
    """Return the record of a batch of a store that only the host can decode."""
    from activation_store import CODECS
    from tests.support.toys.codec import Halves

    with CODECS.registered("host", Halves(host_only=True)), device:
        store = open_store(write(folder, "host"))
        source = StoreSource(store, "acts", BatchOrder(0, 512, 2, 4096), torch.device("cuda"))
        return _second_batch(device, source)


def shared_gather(device: FakeDevice, folder: str) -> Record:
    """Return the record of a batch of which each of two latent shards reads a half."""
    device.answers = ANSWERS
    store = open_store(write(folder))
    with ranks(device, latent=2) as mesh:
        order = BatchOrder(0, 512, 2, 4096)
        shared = SharedReads.for_mesh(mesh, 60.0)
        source = StoreSource(store, "acts", order, torch.device("cuda"), shared_reads=shared)
        return _second_batch(device, source)


def mixture(device: FakeDevice, folder: str) -> Record:
    """Return the record of a batch that two latent shards gather on the host, in halves."""
    device.answers = ANSWERS
    store = open_store(write(folder))
    with ranks(device, latent=2) as mesh:
        shared = SharedReads.for_mesh(mesh, 60.0)
        order = BatchOrder(0, 512, 2, 4096)
        cuda = torch.device("cuda")
        source = MixtureSource([store], [1.0], "acts", order, cuda, shared)
        return _second_batch(device, source)


def _small_trainer(device: FakeDevice, mesh: Any, folder: str, optim: Mapping[str, Any]) -> Trainer:
    config = make_config(SMALL, optim, {"tokens": 100 * 512, "batch_tokens": 512})
    return make_trainer(mesh, config, D_SMALL, Path(folder))


def staging(device: FakeDevice, folder: str) -> dict[str, Any]:
    """Copy a checkpoint to the host twice.

    Returns:
        `record`: that of the second copy; `names`: of all tensors; `n_blocks`: number of blocks.
    """
    device.answers = ANSWERS
    with ranks(device) as mesh:
        trainer = _small_trainer(device, mesh, folder, {"moments": "bfloat16"})
        trainer.take_step()
        copy = HostCopy(mesh, trainer.device, True, dist.new_group(backend="gloo"))
        copy.prepare(trainer.engine)
        _copy_once(copy, trainer)
        device.clear()
        names = _copy_once(copy, trainer)
        return {"record": device.clear(), "names": sorted(names), "n_blocks": copy.n_blocks}


def _copy_once(copy: HostCopy, trainer: Trainer) -> set[str]:
    """Copy a checkpoint to the host and return its blocks; return the names of its tensors."""
    staging = Staging()
    copy.take(trainer.engine, staging)
    names = set()
    while (block := staging.next()) is not None:
        with block as pieces:
            assert all(piece.data.is_pinned() for piece in pieces)
            names |= {piece.key for piece in pieces}
    return names


def resume(device: FakeDevice, folder: str, optim: Mapping[str, Any] = {}) -> list[str]:
    """Save a checkpoint of a default run, and resume it; return the trained SAE's buffers."""
    device.answers = ANSWERS
    checkpoints = Path(folder) / "checkpoints"
    with ranks(device) as mesh:
        trainer = _small_trainer(device, mesh, str(checkpoints), optim)
        assert trainer.engine.sae.copies is not None, "the default run keeps 16-bit copies"
        trainer.take_step()
        trainer.save()
        trainer.end()
        fresh = _small_trainer(device, mesh, str(checkpoints), optim)
        fresh.resume(next(checkpoints.glob("step-*")))
        assert fresh.step == 1
        fresh.take_step()
        return [name for name, _ in fresh.engine.sae.named_buffers()]


def save_small(device: FakeDevice, folder: str) -> str:
    """Save a checkpoint and return its folder."""
    device.answers = ANSWERS
    checkpoints = Path(folder) / "checkpoints"
    with ranks(device) as mesh:
        trainer = _small_trainer(device, mesh, str(checkpoints), {})
        trainer.take_step()
        trainer.save()
        trainer.end()
    return str(next(checkpoints.glob("step-*")))


def sharded_sae(folder: str) -> ShardedSAE:
    """Return a checkpoint's SAE as an evaluation on one GPU uses it, with the default kernels."""
    stored = open_sae(folder)
    plan = plan_shards(stored.config, stored.d_model, [torch.device("cuda")], 32 << 30, 2)
    assert plan.resident
    return ShardedSAE(stored, plan, get_kernels("triton", torch.bfloat16))


def inference(device: FakeDevice, folder: str) -> dict[str, Record]:
    """Load an SAE onto the device and use it; return a record for each use."""
    from analysis.evaluation.firing import count_firings, sample_rows
    from analysis.evaluation.reconstruction import ReconstructionSums

    sae_folder = save_small(device, folder)
    store = open_store(write(folder, items=1))
    records = {}
    with device:
        sae = load_sae(sae_folder).to("cuda")
        x = torch.empty(2048, D_SMALL, device="cuda")
        device.clear()
        values, indices = sae.encode_topk(x)
        records["encode_topk"] = device.clear()
        assert values.device.type == indices.device.type == "cuda"
        assert sae.decode_topk(values, indices).device.type == "cuda"
        records["decode_topk"] = device.clear()
        assert sae(x).shape == x.shape and sae.decode(sae.encode(x)).shape == x.shape
        records["dense"] = device.clear()
        sharded = sharded_sae(sae_folder)
        sums = ReconstructionSums(sharded)
        found = count_firings(sharded, store, "acts", sample_rows(store, None, 0), [sums])
        assert found.n_rows == store.n_tokens and found.counts.device.type == "cpu"
        records["count_firings"] = device.clear()
    return records


def spliced(device: FakeDevice, folder: str) -> Record:
    """Run a language model on the device with an SAE's reconstructions; return the record."""
    import numpy as np

    from analysis.evaluation.predictions import PredictionSums
    from analysis.evaluation.reconstruction import ReconstructionSums
    from analysis.evaluation.splice import SplicedEvaluation
    from tests.support.fake_cuda.tiny_model import TinyModel, tiny_split

    sae_folder = save_small(device, folder)
    with device:
        sae = sharded_sae(sae_folder)
        model = TinyModel(D_SMALL).to("cuda")
        sums = [ReconstructionSums(sae), PredictionSums(sae)]
        mean = torch.zeros(D_SMALL, dtype=torch.float64)
        evaluation = SplicedEvaluation(model, sae, "layer", mean, sums)
        device.clear()
        evaluation.run(tiny_split(4), np.arange(4), 4)
        return device.clear()


def captured_runs(device: FakeDevice, folder: str) -> dict[str, Any]:
    """Run the captured runs of `benchmarks.gpu`'s part `graph`, with and without DeepSpeed.

    Returns:
        For each kind of run, whether its steps are captured, and the record of a replay.
    """
    device.answers = ANSWERS
    setup = Setup(torch.device("cuda"), "triton", torch.bfloat16)
    context = Context(setup, INTERPRETED, Budget(), False, Path(folder) / "result.json")

    def on_device(config: Any, d_model: int, kernels: Any, to: torch.device) -> Any:
        # The fake device cannot create tensors from those without memory.
        return build_sae(config, d_model, one_rank_mesh("cuda"), kernels, 0).to(to)

    found: dict[str, Any] = {}
    for kind in (graph.EagerEngineRun, resume_part.EngineRun, graph.CapturedPlainRun):
        one_rank_mesh.cache_clear()  # its groups ended with those of the last run
        with ranks(device), patch.object(resume_part, "fresh_sae", on_device):
            run = kind(context, graph.VARIANT, 0)
            raw = torch.empty(context.shapes.resumed.B, context.shapes.resumed.D, device="cuda")
            for step in range(5):
                device.clear()
                run.train(raw, step)
            found[kind.__name__] = (graph.is_captured(run), device.clear())
    one_rank_mesh.cache_clear()
    return found
