"""Test run folders from untrusted sources: nothing is executed, resolved or left unchecked."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from analysis.export.saelens import saelens_config
from analysis.origin import Source
from benchmarks.harness.synthetic_checkpoint import NAME, make_checkpoint, write_manifest
from cluster.run_folder.opening import open_run
from cluster.run_folder.saved_config import load_config, save_config
from cluster.training.metric_sinks import MetricSinks
from conf.checks import validate
from conf.schema.run import RunConfig
from foundation.atomic_files import read_json
from foundation.errors import ConfigError
from sae_core import load_sae
from sae_core.checkpoint.folder import check_manifest, newest_valid, read_state
from sae_core.checkpoint.row_ranges import SHARDING, read_layout
from sae_core.checkpoint.safetensors_file import TensorFileWriter, read_header
from sae_core.checkpoint.verify import checkpoint_problems
from sae_core.errors import CheckpointError, DamagedCheckpointError

L, D = 8, 4


class Payload:
    """An object that makes a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run" / "checkpoints", L, D)


# ---- pickles ----


def test_the_payload_works(marker: Path):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_planted_pickles_are_never_read(checkpoint: Path, marker: Path):
    run, root = checkpoint.parent.parent, checkpoint.parent
    expected = load_sae(run)
    planted = [root / "global_step9" / "mp_rank_00_model_states.pt", run / "ae.pt", run / "sae.pkl"]
    for path in planted:
        path.parent.mkdir(exist_ok=True)
        torch.save({"module": Payload(marker)}, path)
    (root / "latest").write_text("global_step9")  # as DeepSpeed names its checkpoints
    assert torch.equal(load_sae(run, allow_pt=True).W_enc, expected.W_enc)
    assert newest_valid(root) == checkpoint

    # torch's own checkpoints keep this pickle next to their files.
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata: not in the manifest"):
        load_sae(checkpoint)
    write_manifest(checkpoint)  # an attacker can write a valid manifest
    with pytest.raises(
        DamagedCheckpointError, match=r"\.metadata: unexpected file in a checkpoint"
    ):
        load_sae(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["ae.pt", "weights.pt"])
def test_a_pt_file_is_read_on_request_and_never_runs(tmp_path: Path, marker: Path, name: str):
    torch.save({"encoder.weight": Payload(marker)}, tmp_path / name)
    path = tmp_path if name == "ae.pt" else tmp_path / name
    with pytest.raises(CheckpointError, match=r"is a pickle.*allow_pt=True"):
        load_sae(path)
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        load_sae(path, allow_pt=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": torch.tensor(0)}, "sae.k=0"),
        ({"k": "many"}, "ValueError"),
        ({"k": torch.tensor(math.inf)}, "OverflowError"),
        ({"b_dec": torch.zeros(D, device="meta")}, "b_dec: expected a plain tensor"),
        (
            {
                "encoder.weight": torch.zeros(1, 1).expand(1 << 44, D),
                "encoder.bias": torch.zeros(1).expand(1 << 44),
                "decoder.weight": torch.zeros(1, 1).expand(D, 1 << 44),
            },
            "encoder.weight: expected a plain tensor",  # a few bytes that claim to be 1 PiB
        ),
        ({"b_dec": torch.zeros(3)}, "W_enc has shape"),
        ({"encoder.bias": [1, 2]}, "TypeError|AttributeError"),
        ({"pre_bias": torch.zeros(4)}, "openai"),
    ],
)
def test_a_pt_file_of_another_kind_is_named(tmp_path: Path, change: dict[str, Any], problem: str):
    state = {
        "encoder.weight": torch.randn(L, D),
        "encoder.bias": torch.zeros(L),
        "decoder.weight": torch.randn(D, L),
        "b_dec": torch.zeros(D),
        "k": torch.tensor(2),
    }
    torch.save(state, tmp_path / "ae.pt")
    assert load_sae(tmp_path, allow_pt=True).W_dec.shape == (L, D)
    torch.save(state | change, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match=problem):
        load_sae(tmp_path, allow_pt=True)


# ---- safetensors headers ----


def with_header(path: Path, header: bytes, data: bytes = bytes(16), length: int | None = None):
    n_bytes = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", n_bytes) + header + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, Any] = {
    "is not an object": [1],
    "is not JSON": b"{",
    "is nested": b"[" * 200_000,
    "holds NaN": b'{"a": NaN}',
    "has no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "has an unknown dtype": {"a": entry(dtype="object")},
    "has a dtype that is a list": {"a": entry(dtype=["F32"])},
    "has a negative shape": {"a": entry(shape=[-4])},
    "has a fractional shape": {"a": entry(shape=[4.0])},
    "has a true shape": {"a": entry(shape=[True, 4])},
    "has an absurd shape": {"a": entry(shape=[1 << 61, 1 << 61])},
    "has many dimensions": {"a": entry(shape=[1] * 1000 + [4])},
    "ends outside the file": {"a": entry(shape=[400], offsets=[0, 1600])},
    "begins outside the file": {"a": entry(offsets=[1 << 40, (1 << 40) + 16])},
    "has negative offsets": {"a": entry(offsets=[-16, 0])},
    "says two sizes": {"a": entry(offsets=[0, 8])},
    "overlaps": {"a": entry(), "b": entry()},
    "leaves a gap": {"a": entry(shape=[2], offsets=[8, 16])},
    "leaves bytes over": {"a": entry(shape=[2], offsets=[0, 8])},
    "has metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
}


@pytest.mark.parametrize("problem", HEADERS)
def test_invalid_headers_are_refused(tmp_path: Path, problem: str):
    made = HEADERS[problem]
    raw = made if isinstance(made, bytes) else json.dumps(made).encode()
    path = with_header(tmp_path / "a.safetensors", raw)
    with pytest.raises(DamagedCheckpointError, match=r"a\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 62, 17 << 20, 100])
def test_a_header_beyond_its_file_or_the_limit_is_not_read(tmp_path: Path, length: int):
    path = with_header(tmp_path / "a.safetensors", b"{}", length=length)
    os.truncate(path, 20 << 20 if length == 17 << 20 else 26)
    with pytest.raises(DamagedCheckpointError, match="a header of"):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_a_header_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    with TensorFileWriter(path, {"a": (torch.float32, (4, 2)), "b": (torch.int8, (3,))}):
        pass
    data = path.read_bytes()
    path.write_bytes(data[:at] + noise + data[at + len(noise) // 2 :])
    try:
        header = read_header(path)
    except DamagedCheckpointError:
        return
    size = path.stat().st_size
    assert all(e.offset_bytes + e.n_bytes <= size for e in header.entries.values())


@pytest.mark.parametrize(
    "offsets", [[0, 0], [9, 0], [4, 1], [-4, 0], [4], ["4", 0], [True, 0], None, {}]
)
def test_row_ranges_that_do_not_cover_a_tensor_are_refused(checkpoint: Path, offsets: Any):
    second = sorted((checkpoint / "weights").iterdir())[1]
    header = read_header(second)
    table = json.loads(header.metadata[SHARDING])
    table[f"{NAME}.W_enc"] = {"saved_offsets": offsets}
    shapes = {name: (e.dtype, e.shape) for name, e in header.entries.items()}
    second.unlink()
    with TensorFileWriter(second, shapes, {SHARDING: json.dumps(table)}):
        pass
    with pytest.raises(DamagedCheckpointError, match=r"00002-model|missing or duplicated"):
        read_layout(checkpoint / "weights")
    write_manifest(checkpoint)
    assert checkpoint_problems(checkpoint)


# ---- manifests, states, configs ----


@pytest.mark.parametrize("name", ["../../outside.json", "/etc/hostname", "weights/../state.json"])
def test_names_cannot_lead_out_of_the_folder(checkpoint: Path, name: str):
    (checkpoint.parent.parent / "outside.json").write_text("{}")
    manifest = read_json(checkpoint / "manifest.json")
    manifest["files"][name] = {"bytes": 2, "sha256": "0" * 64}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match="missing"):
        check_manifest(checkpoint)


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_links_in_a_checkpoint_are_refused(checkpoint: Path, tmp_path: Path, what: str):
    target = checkpoint / "weights"
    if what == "a file":
        target = sorted(target.iterdir())[0]
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    if what == "a file":
        write_manifest(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"a link|not in the manifest"):
        check_manifest(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "7"},
        {"step": -1},
        {"step": True},
        {"tokens": 1e300},
        {"d_model": 10**30},
        {"source_identity": ["x"]},
        {"saes": {NAME: {"n_latents": "8"}}},
        {"saes": {NAME: {"n_latents": 8, "k": 4, "_target_": "os.system"}}},
        {"saes": [1]},
        {"mesh": {"latent": 1.5}},
        {"prefilter": {"name": "none"}},
        {"prefilter": {"name": "none", "processor": "x", "seconds": {"none": "soon"}}},
        {"unknown": 1},
    ],
)
def test_invalid_states_are_refused(checkpoint: Path, change: dict[str, Any]):
    path = checkpoint / "state.json"
    path.write_text(json.dumps(read_json(path) | change))
    write_manifest(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"state\.json"):
        read_state(checkpoint)
    with pytest.warns(UserWarning, match=r"state\.json"):
        assert newest_valid(checkpoint.parent) is None


def test_sizes_that_contradict_the_tensors_are_refused(checkpoint: Path):
    path = checkpoint / "state.json"
    state = read_json(path)
    state["saes"][NAME]["n_latents"] = 1 << 40  # claims to be 16 TiB
    path.write_text(json.dumps(state))
    write_manifest(checkpoint)
    with pytest.raises(DamagedCheckpointError, match="W_enc has shape"):
        load_sae(checkpoint)
    assert "W_enc has shape" in checkpoint_problems(checkpoint)[0]


@pytest.mark.parametrize("text", ["{}" + " " * (1 << 16), "[" * 100_000, '{"a": Infinity}', "{"])
def test_json_is_bounded(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json", 1 << 16 if text.startswith("{}") else 1 << 20)


CONFIGS = {
    "an interpolation": "name: ${oc.env:A_SECRET}",
    "an interpolation in a list": "model: {hookpoints: ['x${oc.env:A_SECRET}']}",
    "an interpolation in a key": "'${oc.env:A_SECRET}': 1",
    "a tag": "name: !!python/object/apply:os.mkdir ['MARKER']",
    "another tag": "name: !<tag:yaml.org,2002:python/object/new:os.mkdir> ['MARKER']",
    "a target": "store: {_target_: os.mkdir, path: MARKER}",
    "an unknown key": "colour: red",
    "an alias": "data: &a {path: x}\nmodel: *a",
    "a bomb": "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]",
    "depth": "a: " + "[" * 5000 + "]" * 5000,
    "a wrong type": "seed: [1]",
    "not a mapping": "- 1",
    "not YAML": "a: [",
    "size": "name: " + "x" * (2 << 20),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_config_is_plain_values(tmp_path: Path, marker: Path, monkeypatch, kind: str):
    monkeypatch.setenv("A_SECRET", "swordfish")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIGS[kind].replace("MARKER", str(marker)))
    with pytest.raises(ConfigError, match=r"config\.yaml") as refused:
        load_config(path)
    assert "swordfish" not in str(refused.value)
    assert not marker.exists()


def test_a_config_larger_than_memory_is_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("name: x")
    os.truncate(path, 1 << 42)  # a sparse file, which takes no disk space
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        load_config(path)


def test_a_saved_config_is_read_back(tmp_path: Path):
    config = RunConfig(name=tmp_path.name, runs_dir=str(tmp_path.parent), seed=3)
    config.data.path, config.model.hookpoints = "a: *b & !c # {d}", ["layers.1", "'quoted'"]
    config.optim.lr = 1e-5
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


# ---- secrets ----


def config_with(key: str, value: object) -> RunConfig:
    config = OmegaConf.structured(RunConfig)
    OmegaConf.update(config, key, value)
    return cast(RunConfig, OmegaConf.to_object(config))


@pytest.mark.parametrize("key", ["store.path", "data.path", "cluster.address", "reshard.to"])
def test_an_address_with_a_password_is_refused_without_repeating_it(key: str):
    config = config_with(key, "s3://key-id:swordfish@bucket/prefix")
    with pytest.raises(ConfigError, match=rf"{key}='s3://\*\*\*@bucket/prefix'") as refused:
        validate(config, ("pipeline",))
    assert "swordfish" not in str(refused.value) and "key-id" not in str(refused.value)


@pytest.mark.parametrize("key", ["submit.setup", "submit.sbatch", "model.hookpoints"])
def test_an_address_with_a_password_is_refused_in_a_list(key: str):
    config = config_with(key, ["plain", "get https://key-id:swordfish@host/x"])
    with pytest.raises(ConfigError, match=rf"{key}='get https://\*\*\*@host/x'") as refused:
        validate(config, ("pipeline",))
    assert "swordfish" not in str(refused.value)


def test_no_secret_of_the_environment_is_saved(tmp_path: Path, monkeypatch, capfd):
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIASECRETID",
        "AWS_SECRET_ACCESS_KEY": "aws-swordfish",
        "WANDB_API_KEY": "5ecre7" * 6 + "abcd",
        "HF_TOKEN": "hf_swordfish",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(name="run", stage="train", runs_dir=str(tmp_path))
    config.logging.wandb = "offline"
    with open_run(config) as run_dir:
        sinks = MetricSinks(config, run_dir, console=True)
        row = dict.fromkeys(("loss", "fvu", "l0", "dead_fraction", "tokens_per_s"), 0.5)
        row |= dict.fromkeys(("loader_wait_fraction", "mfu", "peak_memory_bytes"), 0.5)
        sinks.write({"sae": "s", "step": 1, "tokens": 8, **row})
        sinks.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "env.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any("wandb" in path.parts for path in files)
    written = b"".join(path.read_bytes() for path in files) + "".join(capfd.readouterr()).encode()
    assert not [name for name, value in secrets.items() if value.encode() in written]


# ---- peers' folders ----


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"architecture": "temporal"}, "architecture='temporal', expected one of"),
        ({"architecture": "jumprelu"}, "threshold has shape None"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"k": None}, "k=None"),
        ({"k": 10**9}, "sae.k"),
        ({"d_sae": 9}, "has shape"),
        ({"metadata": "x"}, "AttributeError"),
    ],
)
def test_a_saelens_folder_of_another_kind_is_named(
    tmp_path: Path, change: dict[str, Any], problem: str
):
    config = RunConfig()
    stored = load_sae(make_checkpoint(tmp_path / "c", L, D)).stored()
    source = Source("m", None, "d", NAME, config.data.context_tokens, True, None)
    shapes = {"W_enc": (D, L), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)}
    laid = {name: (torch.float32, shape) for name, shape in shapes.items()}
    with TensorFileWriter(tmp_path / "sae_weights.safetensors", laid):
        pass
    cfg = saelens_config(stored, source)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(tmp_path).W_enc.shape == (L, D)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(CheckpointError, match=problem):
        load_sae(tmp_path)
