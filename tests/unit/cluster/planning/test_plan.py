"""Test the plan: hand-counted cases, refused settings, the search for a layout."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from activation_store import CODECS
from activation_store.config import MixedStore
from cluster.planning.hardware import GIB, Hardware, Link, Rates, gpu, shared_among
from cluster.planning.links import Collective, collectives, seconds
from cluster.planning.memory import device_bytes, host_bytes
from cluster.planning.mesh_search import best_layout, layouts, plan_layout
from cluster.planning.stage import run
from cluster.planning.step_buffers import Moment, gpu_buffers, peak
from cluster.planning.step_time import compute_seconds, read_seconds, schedule, step_seconds
from cluster.planning.storage import store_bytes_total
from cluster.planning.tables import run_table
from cluster.planning.work import Work, work_of
from conf.schema.plan import PlanConfig
from conf.schema.run import RunConfig
from foundation.errors import ConfigError
from sae_core.checkpoint.host_copy import BLOCK_BYTES, FEWEST_BLOCKS
from sae_core.config import OptimConfig, ParallelConfig, TopKConfig, TrainConfig
from tests.support.paths import ROOT
from tests.support.tiny_models import write_text
from tests.support.toys.codec import Halves

H100 = gpu(PlanConfig(hardware="h100"))
INF = float("inf")
ONLY_PRODUCTS = Rates(2.0, INF, INF, 0.0, INF, INF, INF, INF, 0.0, 0.0)


def config_of(n_latents=64, k=2, batch=8, latent=1, data=1, **plan) -> RunConfig:
    config = RunConfig(
        sae=TopKConfig(n_latents=n_latents, k=k),
        train=TrainConfig(tokens=1000 * batch, batch_tokens=batch, device="cuda"),
        parallel=ParallelConfig(latent, data),
        plan=PlanConfig(**{"dead_fraction": 0.0, "hardware": "h100", **plan}),
    )
    config.model.hookpoints, config.model.d_model = ["h"], 16
    return config


def work(d_model=16, on_gpu=True, **sizes) -> Work:
    return work_of(config_of(**sizes), d_model, on_gpu=on_gpu)


def test_state_bytes_are_those_of_the_largest_shard():
    parts = device_bytes(work(n_latents=66, latent=4), H100)  # shards of 17, 17, 17 and 15
    weights = 17 * (2 * 16 + 1) + 16
    assert parts["weights"] == 4 * weights
    assert parts["moments"] == 8 * weights
    assert parts["low-precision copies"] == 2 * 2 * 17 * 16
    assert parts["tokens since fired"] == 8 * 17
    assert "gradients" not in parts


def test_the_dense_update_has_gradients_and_zero_shares_moments():
    config = config_of(data=2)
    config.parallel.zero_stage = 1
    on_cpu = work_of(config, 16, on_gpu=False)
    parts = device_bytes(on_cpu, H100)
    weights = 64 * 33 + 16
    assert parts["gradients"] == 4 * weights
    assert parts["moments"] == 8 * weights / 2
    assert parts["ZeRO's masters and bucket"] == 3 * 4 * weights / 2 + 4 * weights
    assert "low-precision copies" not in parts


def test_bfloat16_moments_take_half():
    config = config_of()
    config.optim = OptimConfig(moments="bfloat16")
    assert device_bytes(work_of(config, 16, on_gpu=True), H100)["moments"] == 4 * (64 * 33 + 16)


def test_a_checkpoint_is_shared_by_replicas():
    assert host_bytes(work(data=4))["checkpoint copy"] == 2 * 16 * 16 * (4 + 8)


def million(host_memory_gib=None, **sae) -> tuple[RunConfig, Hardware]:
    """Return a run of 2**20 latents of width 4096 on one H200, and its hardware."""
    config = config_of(n_latents=1 << 20, batch=1 << 15, k=64, host_memory_gib=host_memory_gib)
    config.plan.hardware, config.model.d_model = "h200", 4096
    for key, value in sae.items():
        setattr(config.sae, key, value)
    return config, gpu(config.plan)


def test_a_host_with_too_little_memory_for_a_copy_blocks_training():
    config, hardware = million(host_memory_gib=128)
    config.store.buffer_tokens = 1 << 16
    layout = plan_layout(config, 4096, hardware, config.parallel)
    loader = layout.host["loader, pinned"]
    room = (128 - 4) * GIB - loader
    assert room / 2 - BLOCK_BYTES < layout.host["checkpoint copy"] <= room / 2
    assert layout.blocking_bytes == 96 * GIB - layout.host["checkpoint copy"]
    config.checkpoint.asynchronous = False
    layout = plan_layout(config, 4096, hardware, config.parallel)
    assert layout.host["checkpoint copy"] == FEWEST_BLOCKS * BLOCK_BYTES
    assert layout.blocking_bytes == 96 * GIB
    config, hardware = million()  # a host of unknown size is assumed to be large enough
    layout = plan_layout(config, 4096, hardware, config.parallel)
    assert (layout.host["checkpoint copy"], layout.blocking_bytes) == (96 * GIB, 0)


def test_ranks_of_a_small_machine_share_its_memory_for_copies():
    config = config_of(n_latents=1 << 16, k=8, latent=2)
    small = replace(H100, device="cpu", memory_bytes=4 * GIB, shared=True, process_bytes=0)
    layout = plan_layout(config, 1024, small, config.parallel)
    room = 2 * GIB - layout.device_total
    assert layout.host == {"checkpoint copy": room / 2 // BLOCK_BYTES * BLOCK_BYTES}


def test_the_pools_of_auxk_are_counted():
    """32,768 rows of 16,384 keys, and masked copies, take 8 GiB; the mask 0.5, the results 1."""
    config, hardware = million(auxk_rows=1.0)
    config.plan.dead_fraction = 0.05
    buffers = gpu_buffers(work_of(config, 4096, on_gpu=True))
    (pools,) = (buffer for buffer in buffers if buffer.what == "auxiliary pools of keys")
    assert pools.n_bytes / GIB == pytest.approx(9.5, rel=0.01)
    moment, held = peak(buffers)
    assert moment is Moment.SUM  # 67 million pairs, in pieces of 512
    layout = plan_layout(config, 4096, hardware, config.parallel)
    assert layout.device["step"] == sum(held.values())


def test_auxk_on_more_rows_than_fit_is_refused_with_its_setting():
    config, hardware = million(auxk_rows=1.0)
    config.train.batch_tokens = 1 << 17
    config.plan.dead_fraction = 0.05
    text = refusal(config, 4096, hardware)
    assert text.startswith("sae.auxk_rows=1.0") and "use a smaller share, or null" in text
    config.sae = TopKConfig(n_latents=1 << 20, k=64)
    assert plan_layout(config, 4096, hardware, config.parallel).fits


def test_the_plan_shows_the_share_of_rows_that_it_chose(tmp_path, capsys):
    config, _ = million(auxk_rows=None)
    config.plan.dead_fraction = 0.05
    config.store.path = str(tmp_path / "store")
    config.cluster.address = "auto"
    config.data.path = str(write_text(tmp_path / "text.txt"))
    run(config, tmp_path)
    printed = "".join(capsys.readouterr().out.replace("│", "").split())
    assert "auxiliarylosson0.125oftherows" in printed


def test_rows_without_a_certificate_are_encoded_twice():
    hardware = replace(H100, rates=ONLY_PRODUCTS)
    config = config_of()
    config.train.prefilter = "float8"
    product = 2 * 8 * 64 * 16 / 2.0
    phases = schedule(work_of(config, 16, on_gpu=True), hardware)
    # An eighth of the columns stay bfloat16.
    assert compute_seconds(phases) == pytest.approx((7 / 16 + 1 / 8 + 0.05) * product)


def test_wide_pools_take_longer_to_select_from():
    rates = replace(ONLY_PRODUCTS, row_s=1.0, stream_bytes=1.0)
    hardware = replace(H100, rates=rates)

    def encoder_s(k: int) -> float:
        phases = schedule(work(n_latents=1 << 20, k=k), hardware)
        product = 2 * 8 * (1 << 20) * 16 / 2.0
        return next(phase.seconds for phase in phases if phase.what == "encoder") - product

    assert encoder_s(32) == 8
    assert encoder_s(64) == pytest.approx(8 * 2 * (6 / 5) ** 2)  # 512 keys instead of 256
    assert encoder_s(2048) == 4 * 8 * 16384 * 81  # segments of 1, 4, 16 and 64 pools


def test_a_million_latents_on_eight_gpus():
    """Each of 8 ranks holds 2 x 2**20 x 4096 / 8 = 2**30 weights: 14 GiB of state.

    The weights and each of the two moments take 4 GiB, the low-precision copies 2 GiB.
    """
    parts = device_bytes(work(4096, n_latents=1 << 20, k=64, latent=8), H100)
    state = parts["weights"] + parts["moments"] + parts["low-precision copies"]
    assert state / GIB == pytest.approx(14, rel=1e-3)


def calls_of(*args, **sizes) -> dict[str, Collective]:
    return {c.what: c for part in collectives(work(*args, **sizes)).values() for c in part}


def test_traffic_of_a_latent_group():
    calls = calls_of(latent=4)
    assert calls["rows"].sent_bytes == 8 * 16 * 2 * 3 / 4
    assert calls["selection"].sent_bytes == 8 * (8 - 2) * 2  # keys of rows that other ranks merge
    assert calls["selection, k-th keys"].sent_bytes == 8 * 2 * 3
    assert calls["reconstruction"].sent_bytes == 2 * 3 / 4 * 8 * 16 * 4
    assert "pairs" not in calls


def test_traffic_of_replicas_is_sparse_or_dense():
    sparse = calls_of(data=2)
    # 4 rows of 2 slots, and of 8 for latents that may be dead, and the rows' numbers of pairs
    assert sparse["pairs"].sent_bytes == 4 * (2 + 8) * 12 + (4 + 4) * 8
    assert sparse["inputs and errors"].sent_bytes == 2 * (4 + 4) * 16 * 2
    config = config_of(data=2)
    config.optim.update = "dense"
    calls = collectives(work_of(config, 16, on_gpu=True))["exchange"]
    assert [call.what for call in calls] == ["dense gradients"]
    assert calls[0].sent_bytes == (64 * 33 + 16) * 4


def test_one_rank_sends_nothing():
    assert collectives(work()) == {}


@pytest.mark.parametrize(
    ("kind", "latent", "expected"),
    [
        ("all-reduce", 8, 8e9 / 100e9),
        ("all-reduce", 16, 8e9 / 80e9),  # eight network adapters a node
        ("all-to-all", 16, 8e9 * 8 / 15 / 10e9),  # 8 of 15 peers are elsewhere
    ],
)
def test_links(kind, latent, expected):
    node, network = Link(100e9, 100e9, 100e9, 0.0), Link(10e9, 10e9, 10e9, 0.0)
    hardware = replace(H100, node=node, network=network)
    spread = work(latent=latent, n_latents=1024)
    taken = seconds(Collective("", "latent", kind, 8e9), spread, hardware)
    assert taken == pytest.approx(expected, rel=1e-3)


def test_replicas_of_whole_nodes_use_one_adapter_each():
    node, network = Link(100e9, 100e9, 100e9, 0.0), Link(10e9, 10e9, 10e9, 0.0)
    hardware = replace(H100, node=node, network=network)
    taken = seconds(Collective("", "data", "all-gather", 8e9), work(latent=8, data=2), hardware)
    assert taken == pytest.approx(0.8)


def test_the_product_is_two_operations_for_each_row_weight_and_channel():
    hardware = replace(H100, rates=ONLY_PRODUCTS)
    phases = schedule(work(), hardware)
    assert compute_seconds(phases) == 2 * 8 * 64 * 16 / 2.0
    dead = schedule(work(dead_fraction=0.25), hardware)  # AuxK encodes 16 of 64 latents again
    assert compute_seconds(dead) == 2 * 8 * (64 + 16) * 16 / 2.0


def test_replicas_update_from_the_pairs_of_all():
    assert work(data=2).update_pairs == 8 * 2
    config = config_of(data=2)
    config.optim.update = "dense"
    assert work_of(config, 16, on_gpu=True).update_pairs == 4 * 2


def test_every_row_has_slots_for_all_pairs_that_it_may_have():
    found = work(latent=4, dead_fraction=0.25)  # shards of 16 latents, 4 of them dead
    assert found.pairs == 8 * (2 + 8) / 4
    assert found.slots == 8 * (2 + 8)  # a shard may have all pairs of a row
    assert work().auxk == 8 and work().pairs == 8 * 2  # the path runs, and finds nothing
    with_stock_kernels = config_of()
    with_stock_kernels.train.kernels = "stock"
    assert work_of(with_stock_kernels, 16, on_gpu=True).slots == 8 * 2


def test_three_blocks_of_stored_rows_are_on_the_device():
    found = work()
    parts = device_bytes(found, H100)
    assert parts["loader"] == 3 * found.block_rows * 16 * 2


def test_a_captured_step_has_a_batch_of_its_own():
    config = config_of()
    assert work_of(config, 16, on_gpu=True).graph and not work(latent=2).graph
    _, captured = peak(gpu_buffers(work_of(config, 16, on_gpu=True)))
    config.train.cuda_graph = "off"
    _, eager = peak(gpu_buffers(work_of(config, 16, on_gpu=True)))
    assert sum(captured.values()) - sum(eager.values()) == 8 * 16 * 2


def test_ranks_of_one_machine_share_it():
    machine = replace(H100, shared=True, ranks_per_node=2)
    halved = shared_among(machine, 2)
    assert halved.rates.product_flops == machine.rates.product_flops / 2
    assert halved.rates.step_s == machine.rates.step_s * 2
    assert shared_among(H100, 2) is H100


def test_reading_is_shared_by_the_ranks_of_a_node():
    one = read_seconds(work(), H100)
    assert one == 8 * 16 * 2 / 10e9
    assert read_seconds(work(data=2), H100) == one
    assert read_seconds(work(data=8, latent=2), H100) == one / 2  # two nodes


def test_every_rank_reads_all_of_a_mixture_on_the_host():
    config = config_of(data=2)
    config.store.mixture = [MixedStore("b")]
    mixed = work_of(config, 16, on_gpu=True)
    assert read_seconds(mixed, H100) == 2 * read_seconds(work(data=2), H100)
    # Batches are uploaded instead of blocks: the one in use, which the step counts, and two more.
    assert device_bytes(mixed, H100)["loader"] == 2 * 4 * 16 * 2
    assert mixed.buffer_rows == 2 * work(data=2).buffer_rows


def test_the_search_finds_what_brute_force_finds():
    config = config_of(n_latents=6 << 16, k=32, batch=4096)
    found = layouts(config, 768, H100, 12)
    assert sorted((f.work.latent, f.work.data, f.work.zero_stage) for f in found) == [
        *((3, 4, 0), (3, 4, 1), (6, 2, 0), (6, 2, 1), (12, 1, 0))
    ]  # 4096 rows split among 1, 2 or 4 of 12 ranks; a single replica exchanges nothing
    best = best_layout(found, config)
    for latent, data, zero_stage in itertools.product(range(1, 13), range(1, 13), (0, 1)):
        if latent * data == 12 and 4096 % data == 0:
            other = plan_layout(config, 768, H100, ParallelConfig(latent, data, zero_stage))
            assert not other.fits or step_seconds(other.phases) >= step_seconds(best.phases)


@pytest.mark.parametrize(
    ("n_latents", "batch", "cheaper"),
    [
        (1 << 14, 1 << 17, "dense, ZeRO 1"),  # fewer weights than rows
        (1 << 20, 1 << 12, "sparse"),
    ],
)
def test_the_search_picks_the_cheaper_exchange(n_latents, batch, cheaper):
    config = config_of(n_latents=n_latents, k=32, batch=batch)
    first, second = (f for f in layouts(config, 768, H100, 2) if f.work.data == 2)
    assert first.exchange == cheaper != second.exchange
    assert step_seconds(first.phases) < step_seconds(second.phases)


def test_an_optimiser_that_needs_one_exchange_gets_no_other():
    config = config_of(n_latents=1 << 14, k=32, batch=1 << 17)
    config.optim.moments = "bfloat16"
    assert {f.exchange for f in layouts(config, 768, H100, 2)} == {"none", "sparse"}
    config.optim = OptimConfig(update="dense")
    found = {f.exchange for f in layouts(config, 768, H100, 2)}
    assert found == {"none", "dense", "dense, ZeRO 1"}


def test_the_search_leaves_out_what_does_not_fit():
    """With slow links, eight replicas of one shard are the fastest layout, but do not fit."""
    slow = Link(1e12, 1e12, 1e6, 0.0)
    small = replace(H100, memory_bytes=12 * GIB, node=slow)
    config = config_of(n_latents=1 << 19, k=32, batch=4096)
    found = layouts(config, 1024, small, 8)
    fits = [layout.fits for layout in found]
    assert fits == sorted(fits, reverse=True) and not fits[-1]
    assert found[-1].work.data == 8 and found[-1].step_s < found[0].step_s
    assert best_layout(found, config) is found[0]


def refusal(config: RunConfig, d_model: int, hardware: Hardware = H100, n: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        best_layout(layouts(config, d_model, hardware, n), config)
    return str(error.value)


def test_a_dictionary_that_is_too_large_is_refused():
    text = refusal(config_of(n_latents=1 << 22, k=32), 4096)
    assert "sae.n_latents" in text and "4194304" in text
    assert "at most 75.6 GiB per GPU" in text
    assert "parallel.latent above 1" in text and "optim.moments=bfloat16" in text


def test_a_batch_that_is_too_large_is_refused():
    text = refusal(config_of(n_latents=1024, batch=1 << 22), 4096)
    assert text.startswith("train.batch_tokens") and "parallel.data" in text


def test_a_buffer_that_is_too_large_is_refused():
    config = config_of(n_latents=1024)
    config.store.buffer_tokens = 1 << 24
    assert refusal(config, 4096).startswith("store.buffer_tokens")


def test_a_number_of_gpus_without_a_mesh_is_refused():
    assert "plan.n_gpus" in refusal(config_of(n_latents=4, batch=4), 16, n=7)


def test_a_store_that_is_too_large_is_refused(tmp_path):
    config = config_of(disk_tib=0.001)
    config.stage, config.data.tokens = "plan", 10**9
    with pytest.raises(ConfigError, match=r"data\.tokens.*plan\.disk_tib"):
        run(config, tmp_path)


def test_a_pipeline_measures_nothing(tmp_path, capsys):
    config = config_of(hardware="local", n_gpus=8, simulate=True)
    config.train.device = "cpu"
    config.cache_dir, config.store.path = str(tmp_path / "cache"), str(tmp_path / "store")
    config.data.path = str(write_text(tmp_path / "text.txt"))
    run(config, tmp_path)
    printed = capsys.readouterr().out
    assert "local, not measured" in printed and "1 latent x 1 data" in printed
    assert "tokens/s" not in printed and not (tmp_path / "cache").exists()


def test_deleting_consumed_activations_limits_the_disk_space():
    config = config_of()
    config.data.tokens = 10**9
    whole = store_bytes_total(config, [16])
    assert whole == 10**9 * (16 * 2 + 16)
    assert store_bytes_total(config, [16, 64]) == 10**9 * ((16 + 64) * 2 + 16)
    config.cluster.retention, config.cluster.max_lead_items = "consumed", 10
    config.checkpoint.every_tokens, config.checkpoint.keep = 10**6, 2
    # Two checkpoints are kept while a third is written, with all rows since the oldest.
    assert store_bytes_total(config, [16]) == ((10 + 2 * 16) * 8192 + 3 * 10**6) * 48
    config.checkpoint.keep_every_tokens = 10**8
    assert store_bytes_total(config, [16]) == whole


@pytest.mark.parametrize(
    ("mode", "step_s", "duration", "cost"),
    [
        (
            "concurrent",
            1,
            "4.00 h for 900 steps",
            "$64: 8 GPUs at $2.00",
        ),  # the harvest takes longer
        (
            "concurrent",
            40,
            "10.00 h for 900 steps",
            "$160: 8 GPUs at $2.00",
        ),  # training takes longer
        ("sequential", 40, "10.00 h for 900 steps", "$40: 2 GPUs at $2.00"),
    ],
)
def test_harvest_and_training_at_once_take_the_longer_time_and_the_gpus_of_both(
    mode, step_s, duration, cost
):
    """3 workers of 2 GPUs, 2 * 3 operations a token: 0.5 tokens/s; 7,200 of them in 4 hours."""
    config = config_of(latent=2, harvest_mfu=0.5)
    config.train.tokens, config.data.tokens = 900 * 8, 10**6
    config.cluster.mode, config.cluster.harvest_workers = mode, 3
    config.model.shards, config.model.n_parameters = 2, 3
    hardware = replace(H100, peak_flops=1.0, price_per_hour=2.0)
    layout = replace(plan_layout(config, 16, hardware, config.parallel), read_s=step_s)
    what, value = (list(column.cells) for column in run_table(layout, config, hardware).columns)
    rows = dict(zip(what, map(str, value), strict=True))
    assert rows["duration"].startswith(duration) and rows["cost"].startswith(cost), rows


def test_a_codec_gives_the_number_of_bytes_per_row():
    config = config_of()
    sizes = {}
    with CODECS.registered("halves", Halves()):
        for codec in CODECS.names():
            config.store.codec = codec
            sizes[codec] = work_of(config, 16, on_gpu=True).stored_row_bytes
    assert sizes == {"none": 32, "blosc": 32, "int8": 16 + 4, "halves": 32 + 4}
    config.store.codec, config.store.dtype = "none", "float32"
    assert work_of(config, 16, on_gpu=True).stored_row_bytes == 64


@pytest.mark.parametrize(
    ("dtype", "codec", "hint"),
    [
        ("bfloat16", "none", "; store.codec=int8 needs 62% of the bytes"),
        ("float32", "blosc", "; store.codec=int8 needs 31% of the bytes"),
        ("bfloat16", "int8", ""),
    ],
)
def test_slow_disks_are_a_reason_for_a_smaller_codec(dtype, codec, hint):
    config = config_of()
    config.store.dtype, config.store.codec = dtype, codec
    layout = plan_layout(config, 16, H100, config.parallel)
    for read_s, wanted in ((layout.step_s, ", which limits training" + hint), (0.0, "")):
        table = run_table(replace(layout, read_s=read_s), config, H100)
        cells = dict(zip(*(column.cells for column in table.columns), strict=True))
        assert cells["reading"].partition("from the disks")[2] == wanted


def test_numbers_of_the_hardware_can_be_set():
    faster = gpu(PlanConfig(hardware="h100", tflops=2 * 989, memory_gib=100, price_per_hour=1.5))
    assert faster.rates.product_flops == 2 * H100.rates.product_flops
    assert (faster.memory_bytes, faster.price_per_hour) == (100 * GIB, 1.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hardware", "abacus"), ("grow", "x"), ("n_gpus", 0), ("tflops", 0.0), ("slow_factor", 0.5)],
)
def test_impossible_settings(key, value):
    with pytest.raises(ConfigError, match=f"plan.{key}"):
        PlanConfig(**{key: value}).validate()


@pytest.mark.slow
def test_the_command(tmp_path):
    command = (
        f"stage=plan experiment=1m_latents plan.n_gpus=8 plan.simulate=true cache_dir={tmp_path}"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("layouts", "8 x 1", "traffic per rank", "weak scaling", "4,096", "cost"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def cpu(prefiltered: Rates | None, **changes) -> Hardware:
    """Return a CPU whose float32 product has 2 FLOP/s, with these rates of a prefilter."""
    slow = Link(1.0, 1.0, 1.0, 0.0)
    return Hardware(
        "local", "cpu", ONLY_PRODUCTS, 1e12, slow, slow, 1.0, 0.0, 8, 0.0, prefiltered, **changes
    )


def cpu_work(hardware: Hardware, **train) -> Work:
    config = config_of(n_latents=64, k=2)
    config.train = replace(config.train, device="cpu", **train)
    return plan_layout(config, 16, hardware, config.parallel).work


def test_the_plan_expects_the_prefilter_that_is_predicted_to_be_faster():
    slow, fast = (replace(ONLY_PRODUCTS, product_flops=flops) for flops in (5.0, 7.0))
    # bfloat16x3 needs three times the FLOP of the float32 product.
    for rates, expected in ((None, "none"), (slow, "none"), (fast, "bfloat16x3")):
        assert cpu_work(cpu(rates)).prefilter == expected
    for train in ({"compute_dtype": "bfloat16"}, {"kernels": "reference"}):
        assert cpu_work(cpu(fast), **train).prefilter == "none"
    assert cpu_work(cpu(fast), prefilter="none").prefilter == "none"
    assert cpu_work(cpu(slow), prefilter="bfloat16").prefilter == "bfloat16"
    # Memory is planned for the largest.
    assert cpu_work(cpu(None, timed=False)).prefilter == "bfloat16x3"


def test_each_encoder_has_the_rate_of_its_own_product():
    hardware = cpu(replace(ONLY_PRODUCTS, product_flops=8.0))
    one = 2 * 8 * 64 * 16
    for prefilter, expected in (
        ("none", one / 2),
        ("bfloat16x3", 3 * one / 8),
        ("bfloat16", one / 8),
    ):
        work = cpu_work(hardware, prefilter=prefilter)
        assert compute_seconds(schedule(work, hardware)) == pytest.approx(expected)
    # AuxK selects too many latents for a prefilter.
    wide = replace(cpu_work(hardware, prefilter="bfloat16x3"), k=9)
    assert compute_seconds(schedule(wide, hardware)) == pytest.approx(one / 2)


def test_each_hookpoint_counts_with_its_own_width(tmp_path, capsys, monkeypatch):
    widths = {"h": 16, "mlp": 64}
    monkeypatch.setattr(
        "cluster.language_model.model_checks.hookpoint_width",
        lambda model, name, cache: widths[name],
    )
    monkeypatch.setattr("cluster.planning.stage.require_usable", lambda model: None)
    config = config_of()
    config.stage, config.data.tokens = "plan", 10**9
    config.model.hookpoints, config.model.d_model = ["h", "mlp"], None
    config.plan.disk_tib = 150 * GIB / 2**40  # enough if both were as narrow as the first
    with pytest.raises(ConfigError, match=r"data\.tokens.*need 164 GiB"):
        run(config, tmp_path)
    assert "d_model 16, 64" in capsys.readouterr().out
