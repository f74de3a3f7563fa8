"""Read models whose files are quantised, such as FP8 checkpoints, in the dtype that was asked for.

Quantised weights would be run by other kernels on other hardware, and their activations would
differ between machines. They are therefore dequantised while they are loaded.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cluster.language_model.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def dequantise_on_load(config: Any, folder: Path) -> bool:
    """Change a model's configuration so that transformers dequantises its files.

    Args:
        config: The transformers configuration of the model.
        folder: Folder with the files.

    Returns:
        False if the files are not quantised.

    Raises:
        ModelError: If transformers cannot dequantise these files while it loads them.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    method = str(quantisation.get("quant_method"))
    known = _dequantised_methods()
    if method not in known:
        raise ModelError(
            f"model.path: the files in {folder} are quantised with quant_method={method!r}; "
            f"expected one of {', '.join(known)}, which transformers converts to model.dtype, or "
            "weights that are not quantised; use the model that this one was made from, or save it "
            "dequantised"
        )
    _require_whole_blocks(folder, quantisation.get("weight_block_size"))
    config.quantization_config = {**quantisation, "dequantize": True}
    return True


def require_dequantised(model: nn.Module, folder: Path, dtype: Any) -> None:
    """Cast the weights to one dtype, and check that none of them are still quantised.

    Transformers leaves weights without their scale as they are in the files.

    Raises:
        ModelError: If weights are still quantised.
    """
    import torch

    left = {
        name
        for name, tensor in model.named_parameters()
        if not tensor.is_floating_point() or tensor.element_size() < torch.bfloat16.itemsize
    }
    if left:
        shown = ", ".join(sorted(left)[:4])
        raise ModelError(
            f"model.path: {len(left)} quantised tensor{'s' if len(left) > 1 else ''} in {folder} "
            f"without a scale, or with one of another name: {shown}; download the model again"
        )
    model.to(dtype)


def _require_whole_blocks(folder: Path, block: list[int] | None) -> None:
    """Check that every matrix is divided into whole blocks, each with its own scale.

    Transformers divides a matrix evenly by its number of scales. If the last block is smaller than
    the others, it would multiply rows by the scale of another block.

    Args:
        folder: Folder with the files.
        block: Rows and columns of a block, as the configuration states them.

    Raises:
        ModelError: If a matrix ends inside a block, or a file cannot be read.
    """
    if block is None:
        return
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                    shapes[name] = tensors.get_slice(name).get_shape()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model.path: could not read {file}: {error}") from error
    for name, scales in shapes.items():
        weight = shapes.get(name.removesuffix("_scale_inv"), scales)
        for size, n_blocks, length in zip(weight[-2:], scales[-2:], block, strict=False):
            if weight is not scales and n_blocks > 1 and size != n_blocks * length:
                raise ModelError(
                    f"model.path: {name.removesuffix('_scale_inv')} in {folder} has the shape "
                    f"{weight}, which ends inside a block of weight_block_size={block}; "
                    "transformers does not dequantise it correctly; use weights that are not "
                    "quantised"
                )


def _dequantised_methods() -> list[str]:
    """Return the quantisation methods that transformers can undo while it loads a model.

    GGUF files have a setting of their own, and metal needs a computer of Apple.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return sorted(
        method
        for method, settings in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
        if "dequantize" in inspect.signature(settings.__init__).parameters
        and method not in ("gguf", "metal")
    )
