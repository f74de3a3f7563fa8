"""Report registers, spills and instructions of the Triton kernels on Hopper, without a GPU.

    python -m benchmarks.compile_report [--json FILE]

Compiles every configuration that `TritonKernels` launches for sm_90 and inspects the machine code.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_core.kernels.triton import encode, filter, quantise, segments, select, sparse, update
from sae_core.kernels.triton.launch import FP_FUSION, LARGEST_ROW

RESULT = Path("benchmarks/results/kernels-sm90-compile.json")
_FP8 = quantise.FP8
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    _FP8: "fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", *FP_FUSION)
_COUNTED = ("HGMMA", "QGMMA", "HMMA", "FFMA", "ATOMG", "LDGSTS", "LDG", "STG", "LDL", "STL")


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
    """Run-time arguments that need not be multiples of 16."""


def configurations() -> Iterator[Configuration]:
    """Yield every kernel in every dtype that it runs in."""
    for dtype, precision in (*((dtype, "ieee") for dtype in _TYPES), (torch.float32, "tf32")):
        yield from _encoders(dtype, precision)
    for k in (1, 32, 64, 128, 256, 512):
        shape = select.select_shape(select.pool_width(k), k)
        types = dict(pool="*i64", counts="*i32", threshold="*fp32", overflow="*i32")
        types |= dict(B="i32", k="i32")
        kernel = select.select_kernel
        yield Configuration(f"select k={k}", kernel, types, shape, unaligned={"B", "k"})
    for weights in ("fp32", "bf16"):
        for d_model in (768, 4096):
            yield from _sparse(weights, d_model)
            yield from _seconds_by_phase(weights, d_model)
    yield _decode_error("fp32", LARGEST_ROW)
    yield from _seconds_by_phase("fp32", LARGEST_ROW)
    for d_model in (768, 4096, LARGEST_ROW):
        for moments in ("fp32", "bf16"):
            yield _update("fp32", moments, "bf16", d_model)
    for d_model in (768, 4096):
        yield _update("fp32", "fp32", "", d_model)
        yield _update("bf16", "fp32", "bf16", d_model)
        yield _update("bf16", "bf16", "bf16", d_model)


def _encoders(dtype: torch.dtype, precision: str) -> Iterator[Configuration]:
    tiles = encode.tiles(dtype, precision)
    name = f"{_TYPES[dtype]} {precision}" if dtype == torch.float32 else _TYPES[dtype]
    # The float8 prefilter multiplies outlier columns in bfloat16 (HGMMA), the rest in float8.
    matrix = "HGMMA QGMMA" if dtype == _FP8 else "HGMMA"
    if dtype == torch.float32 and precision == "ieee":
        matrix = ""
    types = {"x": f"*{_TYPES[dtype]}", "W": f"*{_TYPES[dtype]}", "b": "*fp32"}
    types |= {"x_scales": "*fp32", "W_scales": "*fp32", "out": "*i64"}
    types |= {"x_side": "*bf16", "W_side": "*bf16", "side_columns": "i32"}
    types |= {"threshold": "*fp32", "pool": "*i64", "counts": "*i32"}
    types |= dict.fromkeys(("n_rows", "n_latents", "first_latent"), "i32")
    types |= dict.fromkeys(("D", "x_stride", "W_stride", "out_stride"), "i32")
    flags = {"PRECISION": precision, "SPLIT": dtype == _FP8, "WIDEN": False}
    ragged = {"n_rows", "n_latents"}
    sizes = {**tiles.many.options(), **flags}
    kernel = filter.keys_kernel
    yield _configuration(f"keys {name}", kernel, types, sizes, matrix, ragged)
    kernel = filter.filter_kernel
    flags["WIDTH"] = select.pool_width(32)
    for many, tile in ((False, tiles.few), (True, tiles.many)):
        label = f"filter {'many' if many else 'few'} {name}"
        sizes = {**tile.options(), **flags, "MANY": many}
        yield _configuration(label, kernel, types, sizes, matrix, ragged)


def _sparse(weights: str, d_model: int) -> Iterator[Configuration]:
    def sizes(most: int) -> dict[str, Any]:
        BD = sparse.column_block(d_model, most)
        return {"BD": BD, "PAIRS": sparse.PAIRS, **FP_FUSION}

    types, label, ragged = _pair_types(weights), f"{weights} D={d_model}", {"B", "n_pairs"}
    kernel = sparse.decode_kernel
    yield _configuration(f"decode {label}", kernel, types, sizes(512), "", ragged)
    kernel = sparse.decoder_dot_kernel
    yield _configuration(f"decoder_dot {label}", kernel, types, sizes(256), "", ragged)
    yield _decode_error(weights, d_model)
    types = {"matrix": f"*{weights}", "channels": "*i32", "low": "*fp8e4nv", "side": "*bf16"}
    types |= dict.fromkeys(("moved", "squares", "scales"), "*fp32")
    types |= dict.fromkeys(("deviations", "sums"), "fp32")
    types |= dict.fromkeys(("n_rows", "D", "n_side", "width", "side_columns", "stride"), "i32")
    kernel, shape = quantise.split_kernel, quantise.split_shape(d_model)
    yield _configuration(f"split {label}", kernel, types, shape, "", {"n_rows", "n_side"})


def _pair_types(weights: str) -> dict[str, str]:
    types = {"latents": "*i64", "values": "*fp32", "offsets": "*i64", "W": f"*{weights}"}
    types |= dict.fromkeys(("grad", "out", "target", "error", "dots"), "*fp32")
    types |= dict.fromkeys(("B", "n_pairs", "D"), "i32")
    return types | dict.fromkeys(("W_stride", "grad_stride", "target_stride"), "i32")


def _decode_error(weights: str, d_model: int) -> Configuration:
    kernel, shape = sparse.decode_error_kernel, sparse.decode_shape(d_model)
    name = f"decode_error {weights} D={d_model}"
    return _configuration(name, kernel, _pair_types(weights), shape, "", {"B", "n_pairs"})


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
        yield _configuration(label, kernel, types, sizes, "", {"n_slots"})


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
    unaligned: Iterable[str] = (),
) -> Configuration:
    """Create a configuration from those types and sizes that the kernel has arguments for."""
    names = kernel.arg_names
    types = {key: types[key] for key in names if key in types}
    sizes = {key: value for key, value in sizes.items() if key in (*names, *_OPTIONS)}
    return Configuration(name, kernel, types, sizes, matrix, set(unaligned))


def compile_one(configuration: Configuration) -> dict[str, Any]:
    """Compile a kernel for sm_90 and inspect its machine code.

    Returns:
        One row of the report: name, registers per thread, bytes of stack and of local memory,
        shared memory in bytes, warps, programs per multiprocessor, and instruction counts by kind.
    """
    names = configuration.kernel.arg_names
    options = {key: value for key, value in configuration.sizes.items() if key in _OPTIONS}
    sizes = {key: value for key, value in configuration.sizes.items() if key not in _OPTIONS}
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.types.get(name, "constexpr") for name in names},
        constexprs=sizes,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if configuration.types.get(name, "fp32") != "fp32"
            and name not in configuration.unaligned
        },
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage, instructions = _read(built.asm["cubin"])
    warps, shared = built.metadata.num_warps, built.metadata.shared
    return {
        "name": configuration.name,
        "matrix": configuration.matrix,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": shared,
        "num_warps": warps,
        "num_stages": built.metadata.num_stages,
        "programs_per_sm": _programs_per_sm(usage["REG"], warps, shared),
        "instructions": instructions,
        "sizes": sizes,
    }


def spills(row: dict[str, Any]) -> bool:
    """Return True if the compiler spilled registers to local memory."""
    used = row["instructions"]
    return bool(row["local_bytes"] or used.get("LDL") or used.get("STL"))


def report() -> dict[str, Any]:
    """Compile all configurations; return their rows with the target and the versions used."""
    return {
        "target": "sm_90",
        "versions": {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "kernels": [compile_one(configuration) for configuration in configurations()],
    }


def format_row(row: dict[str, Any]) -> str:
    """Format a row of the report as one line of text."""
    used = ", ".join(f"{kind} {n}" for kind, n in row["instructions"].items())
    return (
        f"{row['name']:29} {row['registers']:4} registers  {row['num_warps']} warps  "
        f"{row['shared_bytes']:7} B shared  {row['programs_per_sm']} per SM  "
        f"{'SPILLS' if spills(row) else 'no spills'}  {used}"
    )


def _read(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Return (resource usage, instruction counts by kind) of a compiled kernel."""
    # Triton's package ships NVIDIA's disassembler.
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        ]
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", texts[0])}
    kinds = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", texts[1], re.M))
    counted = {kind: kinds[kind] for kind in _COUNTED if kinds[kind]}
    return usage, {**counted, "all": sum(kinds.values())}


def _programs_per_sm(registers: int, warps: int, shared: int) -> int:
    """Return how many programs fit on a Hopper multiprocessor at once.

    The limits are 64 Ki registers, 227 KiB of shared memory, 64 warps and 32 programs.
    """
    # Registers are allotted in multiples of 8 per thread. Each program reserves 1 KiB of shared
    # memory in addition to the memory that it uses.
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, 232448 // max(shared + 1024, 1), 64 // warps, 32)


def main() -> None:
    """Compile all kernels, print the report and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="report to write")
    options = parser.parse_args()
    result = report()
    for row in result["kernels"]:
        print(format_row(row))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
