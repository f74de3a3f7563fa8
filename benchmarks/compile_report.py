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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_configurations import OPTIONS, Configuration, configurations

RESULT = Path("benchmarks/results/kernels-sm90-compile.json")
_COUNTED = (
    *("HGMMA", "QGMMA", "HMMA", "FFMA", "ATOMG"),
    *("UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL"),
)


def compile_one(configuration: Configuration) -> dict[str, Any]:
    """Compile a kernel for sm_90 and inspect its machine code.

    Returns:
        One row of the report: name, registers per thread, bytes of stack and of local memory,
        shared memory in bytes, warps, programs per multiprocessor, and instruction counts by kind.
    """
    names = configuration.kernel.arg_names
    options = {key: value for key, value in configuration.sizes.items() if key in OPTIONS}
    sizes = {key: value for key, value in configuration.sizes.items() if key not in OPTIONS}
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.types.get(name, "constexpr") for name in names},
        constexprs=sizes,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if configuration.types.get(name, "fp32") != "fp32"
            and not configuration.types[name].startswith("tensordesc")
            and name not in configuration.unaligned
        },
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage, sass = _read(built.asm["cubin"])
    kinds = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.M))
    counted = {kind: kinds[kind] for kind in _COUNTED if kinds[kind]}
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
        "instructions": {**counted, "all": sum(kinds.values())},
        "sizes": sizes,
        **_miss_slots(sass, sizes, warps),
    }


def _miss_slots(sass: str, sizes: dict[str, Any], warps: int) -> dict[str, float]:
    """Return the issue slots per value of an inline epilogue in which no value is above its limit.

    They include the few that do not depend on the number of values. A persistent kernel has two
    copies of the epilogue and is left out, as are kernels without tensor-core instructions.
    """
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ;", sass, re.M)
    products = [i for i, (_, text) in enumerate(code) if "GMMA" in text]
    if sizes.get("EPILOGUE") != "inline" or sizes["PERSISTENT"] or not products:
        return {}
    places = {int(address, 16): i for i, (address, _) in enumerate(code)}
    appends = [i for i, (_, text) in enumerate(code) if "ATOMG" in text]
    place, slots = products[-1] + 1, 0
    while "EXIT" not in code[place][1]:
        slots += 1
        branch = re.search(r"\bBRA 0x([0-9a-f]+)", code[place][1])
        target = places[int(branch[1], 16)] if branch else 0
        # Take the branches around an append.
        skips = any(place < append < target for append in appends)
        place = target if skips else place + 1
    values = sizes["BM"] * sizes["BN"] // (32 * warps)
    return {"slots_per_miss": round(slots / values, 2)}


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
        f"{row['name']:62} {row['registers']:4} registers  {row['num_warps']} warps  "
        f"{row['shared_bytes']:7} B shared  {row['programs_per_sm']} per SM  "
        f"{'SPILLS' if spills(row) else 'no spills'}  {used}"
    )


def _read(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return (resource usage, disassembly) of a compiled kernel."""
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
    return usage, texts[1]


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
