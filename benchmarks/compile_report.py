"""What the Triton kernels become on Hopper, without a GPU: registers, spills, instructions.

    python -m benchmarks.compile_report [--json FILE]

Compiles every configuration that `TritonKernels` launches for sm_90 and reads the machine code.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_core.kernels import triton_encode, triton_select, triton_sparse

RESULT = Path("benchmarks/results/kernels-sm90-compile.json")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_OPTIONS = ("num_warps", "num_stages")
_COUNTED = ("HGMMA", "HMMA", "FFMA", "ATOMG", "LDGSTS", "LDG", "STG", "LDL", "STL")


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Triton type of every run-time argument."""
    sizes: dict[str, Any]
    """Compile-time arguments, `num_warps` and `num_stages`."""
    matrix: bool = False
    """Whether it is meant to use the tensor cores' asynchronous instructions."""
    unaligned: set[str] = field(default_factory=set)
    """Run-time arguments that are not multiples of 16."""


def configurations() -> Iterator[Configuration]:
    """Every kernel in every dtype it runs in."""
    for dtype, precision in (*((dtype, "ieee") for dtype in _TYPES), (torch.float32, "tf32")):
        yield from _encoders(dtype, precision)
    for k in (1, 32, 64, 128, 256):
        shape = triton_select.select_shape(triton_select.pool_width(k), k)
        types = dict(pool="*i64", counts="*i32", threshold="*fp32", overflow="*i32")
        types |= dict(B="i32", k="i32")
        kernel = triton_select.select_kernel
        yield Configuration(f"select k={k}", kernel, types, shape, unaligned={"B", "k"})
    for weights in ("fp32", "bf16"):
        for d_model in (768, 4096):
            yield from _sparse(weights, d_model)


def _encoders(dtype: torch.dtype, precision: str) -> Iterator[Configuration]:
    tiles = triton_encode.tiles(dtype, precision)
    name = f"{_TYPES[dtype]} {precision}" if dtype == torch.float32 else _TYPES[dtype]
    matrix = dtype != torch.float32 or precision == "tf32"
    types = {"x": f"*{_TYPES[dtype]}", "W": f"*{_TYPES[dtype]}", "b": "*fp32"}
    scalars = dict.fromkeys(("n_rows", "n_latents", "first_latent"), "i32")
    strides = dict.fromkeys(("D", "x_stride", "W_stride"), "i32")
    ragged = {"n_rows", "n_latents"}
    keys = {**types, "out": "*i64", **scalars, **strides, "out_stride": "i32"}
    sizes = {**tiles.many.options(), "PRECISION": precision}
    yield Configuration(f"keys {name}", triton_encode.keys_kernel, keys, sizes, matrix, ragged)
    pool = {"threshold": "*fp32", "pool": "*i64", "counts": "*i32"}
    types |= {**pool, **scalars, **strides}
    kernel = triton_encode.filter_kernel
    for many, tile in ((False, tiles.few), (True, tiles.many)):
        sizes = {**tile.options(), "PRECISION": precision, "MANY": many}
        sizes["WIDTH"] = triton_select.pool_width(32)
        label = f"filter {'many' if many else 'few'} {name}"
        yield Configuration(label, kernel, types, sizes, matrix, ragged)


def _sparse(weights: str, d_model: int) -> Iterator[Configuration]:
    def sizes(most: int) -> dict[str, Any]:
        return {"BD": triton_sparse.column_block(d_model, most), "PAIRS": triton_sparse.PAIRS}

    pairs = {"latents": "*i64", "values": "*fp32", "offsets": "*i64", "W": f"*{weights}"}
    scalars = {"B": "i32", "n_pairs": "i32", "D": "i32", "W_stride": "i32", "grad_stride": "i32"}
    ragged = {"B", "n_pairs"}
    label = f"{weights} D={d_model}"
    types = {**pairs, "out": f"*{weights}", **scalars}
    yield _sparse_one(f"decode {label}", triton_sparse.decode_kernel, types, sizes(512), ragged)
    types |= {"grad": "*fp32", "out": "*fp32"}
    kernel = triton_sparse.decoder_dot_kernel
    yield _sparse_one(f"decoder_dot {label}", kernel, types, sizes(256), ragged)
    types = dict.fromkeys(("order", "rows", "begins", "ends", "slots"), "*i64")
    types |= dict.fromkeys(("targets", "firsts", "counts"), "*i64")
    types |= dict.fromkeys(("acts", "dpre", "dW_dec", "dW_enc", "db_enc"), "*fp32")
    types |= dict.fromkeys(("x", "grad"), f"*{weights}")
    types |= dict.fromkeys(("D", "x_stride", "grad_stride"), "i32")
    yield _sparse_one(f"segment {label}", triton_sparse.segment_kernel, types, sizes(128))
    if weights == "fp32":  # it only ever sees fp32 sums
        yield _sparse_one(f"fold {label}", triton_sparse.fold_kernel, types, sizes(128))


def _sparse_one(
    name: str, kernel: Any, types: dict[str, str], sizes: dict[str, Any], unaligned: Any = ()
) -> Configuration:
    names = kernel.arg_names
    types = {key: types[key] for key in names if key in types}
    sizes = {key: value for key, value in sizes.items() if key in names}
    return Configuration(name, kernel, types, sizes, unaligned=set(unaligned))


def compile_one(configuration: Configuration) -> dict[str, Any]:
    """Compiles for sm_90 and reads the machine code.

    Returns:
        One row of the report: name, registers per thread, spill bytes of stack and local memory,
        shared memory in bytes, warps, programs per multiprocessor, instructions by kind.
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
            if name in configuration.types and name not in configuration.unaligned
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
    """Whether registers went to local memory."""
    used = row["instructions"]
    return bool(row["local_bytes"] or used.get("LDL") or used.get("STL"))


def report() -> dict[str, Any]:
    """All configurations, with what compiled them."""
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
    """One line for people."""
    used = ", ".join(f"{kind} {n}" for kind, n in row["instructions"].items())
    return (
        f"{row['name']:28} {row['registers']:4} registers  {row['num_warps']} warps  "
        f"{row['shared_bytes']:7} B shared  {row['programs_per_sm']} per SM  "
        f"{'SPILLS' if spills(row) else 'no spills'}  {used}"
    )


def _read(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """(resources, instructions by kind) of a kernel's machine code."""
    # Triton's package carries NVIDIA's disassembler.
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
    """Programs that fit a Hopper multiprocessor at once: 64 Ki registers, 227 KiB, 64 warps."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, 232448 // max(shared + 1024, 1), 64 // warps, 32)


def main() -> None:
    """Compiles, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    options = parser.parse_args()
    result = report()
    for row in result["kernels"]:
        print(format_row(row))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
