"""Test that quantised models are dequantised exactly or refused, and never read with wrong weights.

The expected weights are computed from the files by this test's own code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cluster.language_model.errors import ModelError
from cluster.language_model.hooks import capture
from cluster.language_model.loading import load_language_model, load_skeleton
from conf.schema.model import ModelConfig
from tests.support.tiny_models import save_llama

BLOCK = 8
IDS = torch.tensor([[0, 5, 9, 30], [0, 7, 7, 8]])
LOADERS = [load_language_model, load_skeleton]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def save_fp8(folder: Path, block: int = BLOCK, **settings: Any) -> dict[str, Tensor]:
    """Save a Llama in FP8 with one scale for each block, and return its weights in float32."""
    save_llama(folder)
    weights = load_file(folder / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in list(weights.items()):
        if "proj" not in name:
            stored[name] = weight
            continue
        rows, columns = weight.shape
        grid = torch.zeros(-(-rows // block), -(-columns // block))
        values = torch.zeros_like(weight)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                # Scales of very different sizes show whether each block gets its own.
                weight[part] *= 3.0 ** (i - j)
                grid[i, j] = weight[part].abs().max() / 448
                values[part] = (weight[part] / grid[i, j]).to(torch.float8_e4m3fn).float()
                weights[name][part] = values[part] * grid[i, j]
        stored[name] = values.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = grid
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    method = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    change_config(folder, quantization_config={**method, **settings})
    return weights


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, loader: Any = load_language_model, dtype: str = "float32") -> nn.Module:
    model: nn.Module = loader(ModelConfig(path=str(folder), dtype=dtype), folder / "cache")
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_are_dequantised_block_by_block(tmp_path: Path, dtype: str) -> None:
    expected = save_fp8(tmp_path)
    wanted = getattr(torch, dtype)
    for loader in LOADERS:
        model = load(tmp_path, loader, dtype)
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert {n: p.shape for n, p in model.named_parameters()} == {
            name: weight.shape for name, weight in expected.items()
        }
    model = load(tmp_path, dtype=dtype)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name].to(wanted), rtol=0, atol=0)


def test_rows_of_an_fp8_model_equal_those_of_its_dequantised_copy(tmp_path: Path) -> None:
    weights = save_fp8(tmp_path / "fp8")
    plain = save_llama(tmp_path / "plain")
    plain.load_state_dict(weights)
    plain.save_pretrained(tmp_path / "plain")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    hookpoint = "model.layers.1"
    rows = capture(load(tmp_path / "fp8"), [hookpoint], IDS)[hookpoint]
    torch.testing.assert_close(rows, capture(expected, [hookpoint], IDS)[hookpoint], rtol=0, atol=0)


@pytest.mark.parametrize("loader", LOADERS)
def test_fp8_files_that_lack_tensors_are_refused(tmp_path: Path, loader: Any) -> None:
    cases: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
        "scale": (
            lambda t: t.pop(f"{Q_PROJ}_scale_inv"),
            f"1 quantised tensor in .* without a scale.*: {Q_PROJ}",
        ),
        "weight": (lambda t: t.pop(Q_PROJ), f"lack tensors of the model: {Q_PROJ}"),
        "norm": (lambda t: t.pop("model.norm.weight"), r"lack .*: model\.norm\.weight"),
    }
    for name, (change, message) in cases.items():
        save_fp8(tmp_path / name)
        change_tensors(tmp_path / name, change)
        with pytest.raises(ModelError, match=message):
            load(tmp_path / name, loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_fp8_files_without_their_configuration_are_refused(tmp_path: Path, loader: Any) -> None:
    save_fp8(tmp_path)
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(ModelError, match=r"does not use: .*_scale_inv"):
        load(tmp_path, loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_matrices_that_end_inside_a_block_are_refused(tmp_path: Path, loader: Any) -> None:
    """Transformers would divide 32 rows into two blocks of 16 instead of 20 and 12."""
    save_fp8(tmp_path, block=20)
    with pytest.raises(ModelError, match=r"down_proj\.weight .* \[16, 32\], which ends inside a"):
        load(tmp_path, loader)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'; expected one of .*fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'; expected one"),
        ({"quant_method": "of tomorrow"}, "quant_method='of tomorrow'; expected one of"),
        ({"quant_method": "compressed-tensors"}, r"pip install compressed-tensors|lack tensors"),
    ],
)
def test_other_quantisations_are_refused(
    tmp_path: Path, loader: Any, settings: dict[str, Any], message: str
) -> None:
    save_llama(tmp_path)
    change_config(tmp_path, quantization_config=settings)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, loader)
