"""The kernels of `TritonKernels`, with the types, sizes and options that they are launched with."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sae_core.kernels.keys import LARGEST_NETWORK, pool_width
from sae_core.kernels.triton import dense, quantise, segments, sparse, update
from sae_core.kernels.triton.encoder import candidates, filter, overflow, select
from sae_core.kernels.triton.launch import COUNTS, FP_FUSION, LARGEST_ROW

_FP8 = quantise.FP8
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    _FP8: "fp8e4nv",
}
_WIDTHS = (512, 768, 2048, 4096, LARGEST_ROW)
"""Values of d_model for which row kernels differ. For example, 2304 has the kernels of 4096."""
_FLOAT32_WIDTHS = (768, 4096, LARGEST_ROW)
_ODD_WIDTH = 1000
_WIDTH_ARGUMENTS = {
    *("D", "stride", "x_stride", "W_stride", "error_stride", "grad_stride", "target_stride"),
    "recon_stride",
}
"""Arguments that are multiples of 16 only if d_model is."""
_SUBSETS = {
    "": (),
    " rows": ("row_index", "row_count"),
    " latents": ("latent_index", "latent_count"),
}
"""Arguments that are given where rows or latents are limited to a subset, else None."""
_AFFINE = ("mean", "scale", "shift")
"""Arguments that are given where raw activations are centred, else None."""
OPTIONS = ("num_warps", "num_stages", "maxnreg", *FP_FUSION)
"""Names of compiler options among `Configuration.sizes`."""


@dataclass(frozen=True)
class Configuration:
    """One kernel with the types and sizes that it is launched with."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Triton type of each run-time argument."""
    sizes: dict[str, Any]
    """Compile-time arguments and compiler options."""
    matrix: str = ""
    """Asynchronous tensor-core instructions that the kernel should use, separated by spaces."""
    unaligned: set[str] = field(default_factory=set)
    """Run-time arguments that are not specialised, and those that need not be multiples of 16."""


def configurations() -> Iterator[Configuration]:
    """Yield every kernel in every dtype that it runs in.

    Row kernels are compiled for a number of columns, so they come in several widths. One of these
    is not a multiple of 16, so that rows are not aligned. The encoder pads such rows.
    """
    for dtype, precision in (*((dtype, "ieee") for dtype in _TYPES), (torch.float32, "tf32")):
        yield from _encoders(dtype, precision)
    yield from _selections()
    for d_model in _WIDTHS:
        yield from _rows("bf16", d_model)
    for d_model in _FLOAT32_WIDTHS:
        yield from _rows("fp32", d_model)
    for each in _rows("bf16", _ODD_WIDTH):
        yield replace(each, unaligned=each.unaligned | (_WIDTH_ARGUMENTS & each.types.keys()))


def _selections() -> Iterator[Configuration]:
    """Yield the selection in every shape that fits the sorting network."""
    types = dict(pool="*i64", counts="*i32", threshold="*fp32", overflow="*i32", B="i32", k="i32")
    kernel = select.select_kernel
    shapes = []
    for k in range(1, LARGEST_NETWORK):
        shape = select.select_shape(pool_width(k), k)
        if pool_width(k) <= LARGEST_NETWORK and shape not in shapes:
            shapes.append(shape)
            yield _configuration(f"select k={k}", kernel, types, shape)


def _rows(inputs: str, d_model: int) -> Iterator[Configuration]:
    """Yield the kernels that work on whole rows of the dictionary or the batch."""
    yield from _sparse(inputs, d_model)
    for raw in ("fp32", "bf16") if d_model != _ODD_WIDTH else ("bf16",):
        yield from _errors(inputs, raw, d_model)
    yield from _seconds_by_phase(inputs, d_model)
    if inputs == "bf16":
        yield from _splits(d_model)
    for moments in ("fp32", "bf16"):
        # The encoder has 16-bit copies of the weights where it multiplies in 16 bits.
        yield _update(inputs, moments, "bf16" if inputs == "bf16" else "", d_model)


def _encoders(dtype: torch.dtype, precision: str) -> Iterator[Configuration]:
    tiles = candidates.tiles(dtype, precision)
    name = f"{_TYPES[dtype]} {precision}" if dtype == torch.float32 else _TYPES[dtype]
    # The float8 prefilter multiplies outlier columns in bfloat16 (HGMMA), the rest in float8.
    matrix = "HGMMA QGMMA" if dtype == _FP8 else "HGMMA"
    if dtype == torch.float32 and precision == "ieee":
        matrix = ""
    types = {"b": "*fp32", "x_scales": "*fp32", "W_scales": "*fp32", "out": "*i64"}
    types |= {"x_side": "*bf16", "W_side": "*bf16", "side_columns": "i32"}
    types |= {"threshold": "*fp32", "pool": "*i64", "counts": "*i32"}
    types |= dict.fromkeys(("n_rows", "n_latents", "first", "stop", "k", "width"), "i32")
    types |= dict.fromkeys(("D", "x_stride", "W_stride", "out_stride"), "i32")
    types |= {"overflow": "*i32"}
    flags = {"PRECISION": precision, "SPLIT": dtype == _FP8, "WIDEN": False}
    pointers = {"x": f"*{_TYPES[dtype]}", "W": f"*{_TYPES[dtype]}"}
    sizes = {**tiles.many.tile.options(), **flags}
    subsets = dict(_SUBSETS)
    if dtype in (_FP8, torch.float16):
        # Only exact products are limited to subsets, and no setting of a run selects float16.
        subsets = {"": ()}
    elif precision == "tf32":
        del subsets[" rows"]  # only after a prefilter, which tf32 has not
    for suffix, given in subsets.items():
        both = types | pointers | dict.fromkeys(given, "*i64")
        kernel = filter.keys_kernel
        yield _configuration(f"keys {name}{suffix}", kernel, both, sizes, matrix)
        if suffix != " rows":
            # 16 rows are too few for the asynchronous tensor-core instructions.
            options = {**overflow.overflow_shape(tiles.many.tile.BK), **flags}
            label = f"overflow {name}{suffix}"
            yield _configuration(label, overflow.overflow_kernel, both, options)
        if suffix:
            for each in (tiles.few.with_pointers, tiles.many):
                options = {**each.tile.options(), **flags, **each.flags()}
                label = f"filter {name} {each.label}{suffix}"
                yield _configuration(label, filter.filter_kernel, both, options, matrix)
    kernel = filter.filter_kernel
    used = [tiles.many, *candidates.candidates(dtype, precision)]
    if dtype == torch.float16:
        used = used[:2]
    used += [each.with_pointers for each in used if each.with_pointers not in used]
    for each in used:
        tile = each.tile
        matrices = pointers
        if each.descriptors:
            matrices = {"x": _descriptor(dtype, tile.BM, tile.BK)}
            matrices["W"] = _descriptor(dtype, tile.BN, tile.BK)
        sizes = {**tile.options(), **flags, **each.flags()}
        label = f"filter {name} {each.label}"
        yield _configuration(label, kernel, types | matrices, sizes, matrix)


def _descriptor(dtype: torch.dtype, n_rows: int, n_columns: int) -> str:
    """Return the Triton type of a tensor descriptor of blocks [n_rows, n_columns]."""
    return f"tensordesc<{_TYPES[dtype]}[{n_rows}, {n_columns}]>"


def _sparse(weights: str, d_model: int) -> Iterator[Configuration]:
    def sizes(most: int) -> dict[str, Any]:
        BD = sparse.column_block(d_model, most)
        return {"BD": BD, "PAIRS": sparse.PAIRS, **FP_FUSION}

    types, label = _pair_types(weights), f"{weights} D={d_model}"
    if d_model in (768, 4096, _ODD_WIDTH):  # with other widths, these are the same
        kernel = sparse.decode_kernel
        yield _configuration(f"decode {label}", kernel, types, sizes(512))
        kernel = sparse.decoder_dot_kernel
        # Inputs of a prefilter are float32; errors are kept in the dtype of the weights' copies.
        for grad in {"fp32": None, weights: None}:
            given = types | {"grad": f"*{grad}"}
            yield _configuration(f"decoder_dot {grad}, {label}", kernel, given, sizes(256))


def _errors(weights: str, raw: str, d_model: int) -> Iterator[Configuration]:
    """Yield the kernels that centre raw rows, and those that form errors of both paths."""
    # Centred rows and errors are kept in the dtype of the dictionary's copies.
    types = _pair_types(weights) | {"error": f"*{weights}", "raw": f"*{raw}", "out": f"*{weights}"}
    types |= dict.fromkeys(("recon", "totals", "squares"), "*fp32")
    types |= dict.fromkeys(("B", "stride", "recon_stride"), "i32")
    affine = dict.fromkeys(_AFFINE, "*fp32")
    label = f"{weights} D={d_model}"
    decode = sparse.decode_shape(d_model)
    shapes = {sparse.decode_error_kernel: decode, dense.subtract_kernel: dense.dense_shape(d_model)}
    targets = {raw: {"target": f"*{raw}"} | affine}
    if raw == weights:
        targets["error"] = {"target": f"*{weights}"}
    for target, given in targets.items():
        for kernel, shape in shapes.items():
            name = f"{kernel.__name__.removesuffix('_kernel')} {target}, {label}"
            yield _configuration(name, kernel, types | given, shape)
    name = f"centre {raw}, {label}"
    shape = dense.dense_shape(d_model)
    yield _configuration(name, dense.centre_kernel, types | affine, shape)


def _splits(d_model: int) -> Iterator[Configuration]:
    """Yield the split of float32 activations and of the weights' 16-bit copies."""
    kernel, shape = quantise.split_kernel, quantise.split_shape(d_model)
    for matrix in ("fp32", "bf16"):
        types = {"matrix": f"*{matrix}", "channels": "*i32", "low": "*fp8e4nv", "side": "*bf16"}
        types |= dict.fromkeys(("moved", "squares", "scales"), "*fp32")
        types |= dict.fromkeys(("deviations", "sums"), "fp32")
        types |= dict.fromkeys(("n_rows", "D", "n_side", "width", "side_columns", "stride"), "i32")
        name = f"split {matrix} D={d_model}"
        yield _configuration(name, kernel, types, shape)


def _pair_types(weights: str) -> dict[str, str]:
    types = {
        "latents": "*i64",
        "values": "*fp32",
        "offsets": "*i64",
        "ends": "*i64",
        "W": f"*{weights}",
    }
    types |= dict.fromkeys(("grad", "out", "target", "error", "dots"), "*fp32")
    types |= dict.fromkeys(("D",), "i32")
    return types | dict.fromkeys(("W_stride", "grad_stride", "target_stride"), "i32")


def _segment_types(inputs: str) -> dict[str, str]:
    types = dict.fromkeys(("rows", "edges", "piece_ends", "owners"), "*i64")
    types |= dict.fromkeys(("values", "dvalues", "dec", "enc", "bias"), "*fp32")
    types |= dict.fromkeys(("dW_dec", "dW_enc", "db_enc", "squares", "W_dec"), "*fp32")
    types |= {"x": f"*{inputs}", "error": f"*{inputs}"}
    return types | dict.fromkeys(("D", "x_stride", "error_stride", "n_slots"), "i32")


def _seconds_by_phase(inputs: str, d_model: int) -> Iterator[Configuration]:
    types = _segment_types(inputs)
    sizes = {"PIECE": segments.PIECE, **segments.sum_shape(d_model)}
    kernels = {
        "piece": segments.piece_kernel,
        "sum": segments.sum_kernel,
        "square": update.square_kernel,
    }
    for name, kernel in kernels.items():
        label = f"{name} {inputs} D={d_model}"
        yield _configuration(label, kernel, types, sizes)
    types |= {"partial": "*fp32", "W": f"*{inputs}", "W_stride": "i32"}
    types |= dict.fromkeys(("n_main", "period"), "i32")
    sizes = {"SLOTS": update.BIAS_SLOTS, **update.input_bias_shape(d_model)}
    kernel = update.input_bias_kernel
    yield _configuration(f"input_bias {inputs} D={d_model}", kernel, types, sizes)


def _update(inputs: str, moments: str, copies: str, d_model: int) -> Configuration:
    types = _segment_types(inputs)
    types |= dict.fromkeys(("W_enc", "b_enc", "m_b", "v_b"), "*fp32")
    types |= dict.fromkeys(("m_enc", "m_dec", "v_enc", "v_dec"), f"*{moments}")
    types |= dict.fromkeys(("copy_enc", "copy_dec"), f"*{copies or 'fp32'}")
    types |= dict.fromkeys(("numbers", "step", "skip"), "*fp32")
    types |= dict.fromkeys(("lerp", "beta2", "weight2", "eps"), "fp32")
    types |= {"first_latent": "i32"}
    sizes = {"PIECE": segments.PIECE, **segments.sum_shape(d_model)}
    sizes |= {"COPIES": bool(copies), "FROM_GRAD": False}
    kernel = update.update_kernel
    name = f"update {inputs} {moments} {copies or 'none'} D={d_model}"
    return _configuration(name, kernel, types, sizes)


def _configuration(
    name: str,
    kernel: Any,
    types: dict[str, str],
    sizes: dict[str, Any],
    matrix: str = "",
) -> Configuration:
    """Create a configuration from those types and sizes that the kernel has arguments for."""
    names = kernel.arg_names
    types = {key: types[key] for key in names if key in types}
    optional = (*_SUBSETS[" rows"], *_SUBSETS[" latents"], *_AFFINE)
    sizes = {key: None for key in optional if key not in types} | sizes
    sizes = {key: value for key, value in sizes.items() if key in (*names, *OPTIONS)}
    return Configuration(name, kernel, types, sizes, matrix, set(COUNTS) & types.keys())
