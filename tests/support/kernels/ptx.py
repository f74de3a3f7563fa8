"""Run the inline PTX of a kernel on the CPU, so that Triton's interpreter can interpret the kernel.

It knows the instructions that the kernels use, parses the same text that the compiler gets, and
reads and writes the memory of CPU tensors by address.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Registers = dict[str, NDArray[Any]]
"""Value of each register in all lanes: bits as unsigned integers, or bool."""

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "setp.gtu.f32": lambda a, b: ~(_float(a) <= _float(b)),
    "setp.eq.f32": lambda a, b: _float(a) == _float(b),
    "setp.nan.f32": lambda a, b: np.isnan(_float(a)) | np.isnan(_float(b)),
    "setp.lt.u32": lambda a, b: a < b,
    "vote.sync.any.pred": lambda a, mask: np.full_like(a, a.any()),
    "add.s32": lambda a, b: a + b,
    "add.s64": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.s32": lambda a, b: (a.view(np.int32) >> b.view(np.int32)).view(np.uint32),
    "shl.b64": lambda a, b: a << b.astype(np.uint64),
    "mul.wide.s32": lambda a, b: (_wide(a) * _wide(b)).view(np.uint64),
}


def run(text: str, operands: Sequence[NDArray[Any]], pack: int) -> None:
    """Run an inline assembly text, with as many lanes as it takes, as if they were one warp.

    Args:
        text: PTX in braces, with operands $0, $1...: `pack` registers for results, which are
            ignored, and then `pack` registers for each of `operands`.
        operands: Values of the operands, 1-dimensional and of equal length, with 4 or 8 bytes. Each
            lane gets `pack` values that follow each other.
        pack: Values that one lane handles.

    Raises:
        NotImplementedError: If the text has an instruction that is not known here.
    """
    registers: Registers = {}
    for j, operand in enumerate(operands, 1):
        assert len(operand) % pack == 0, "the compiler fills an incomplete group"
        for i in range(pack):
            part = operand[i::pack]
            registers[f"${pack * j + i}"] = part.view(f"u{part.dtype.itemsize}").copy()
    n_lanes = len(operands[0]) // pack
    lines = (line.strip().rstrip(";") for line in text.strip().strip("{}").splitlines())
    code = [line for line in lines if line and not line.startswith(".reg")]
    place = 0
    while place < len(code):
        label = None
        if not code[place].endswith(":"):
            label = _step(code[place], registers, n_lanes)
        place = code.index(f"{label}:") if label else place + 1


def _step(line: str, registers: Registers, n_lanes: int) -> str | None:
    """Run one instruction in all lanes, and return the label to go to, if any."""
    match = re.fullmatch(r"(?:@(!?)(\w+) )?([\w.]+) ?(.*)", line)
    if not match:
        raise NotImplementedError(line)
    negated, guard, opcode, rest = match.groups()
    active = np.ones(n_lanes, bool)
    if guard:
        active = ~registers[guard] if negated else registers[guard]
    if opcode == "bra.uni":
        assert active.all() or not active.any(), "a uniform branch must not divide a warp"
        return str(rest) if active.all() else None
    names = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest)
    target, sources = names[0], [_read(name, registers, n_lanes) for name in names[1:]]
    if opcode == "st.global.b64":
        addresses = _read(target, registers, n_lanes)
        for address, value in zip(addresses[active], sources[0][active], strict=True):
            ctypes.c_uint64.from_address(int(address)).value = int(value)
        return None
    if opcode == "atom.global.relaxed.gpu.add.u32":
        result = registers[target].copy()
        pairs = zip(sources[0][active], sources[1][active], strict=True)
        result[active] = [_add(int(address), int(number)) for address, number in pairs]
    else:
        result = _result(opcode, sources)
        if guard:
            result = np.where(active, result, registers[target])
    registers[target] = result
    return None


def _result(opcode: str, sources: list[NDArray[Any]]) -> NDArray[Any]:
    if opcode in _BINARY:
        return np.asarray(_BINARY[opcode](*sources))
    if opcode == "setp.lt.and.s32":
        return np.asarray((sources[0].view(np.int32) < sources[1].view(np.int32)) & sources[2])
    if opcode == "setp.ge.and.s32":
        return np.asarray((sources[0].view(np.int32) >= sources[1].view(np.int32)) & sources[2])
    if opcode == "setp.gtu.or.f32":
        return np.asarray(_BINARY["setp.gtu.f32"](*sources[:2]) | sources[2])
    if opcode in ("mov.b32", "mov.b64"):
        return sources[0]
    if opcode == "cvt.u64.u32":
        return sources[0].astype(np.uint64)
    raise NotImplementedError(opcode)


def _read(name: str, registers: Registers, n_lanes: int) -> NDArray[Any]:
    if name.startswith("["):
        return registers[name[1:-1]]
    if name.startswith("{"):
        low, high = (registers[part.strip()].astype(np.uint64) for part in name[1:-1].split(","))
        return low | (high << np.uint64(32))
    if name in registers:
        return registers[name]
    number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
    return np.full(n_lanes, number, np.uint32)


def _float(bits: NDArray[Any]) -> NDArray[Any]:
    return bits.view(np.float32)


def _wide(bits: NDArray[Any]) -> NDArray[Any]:
    return bits.view(np.int32).astype(np.int64)


def _add(address: int, number: int) -> int:
    counter = ctypes.c_uint32.from_address(address)
    old: int = counter.value
    counter.value = old + number
    return old


def create_inline_asm(
    builder: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
) -> SimpleNamespace:
    """Replace `InterpreterBuilder.create_inline_asm`; the text's result is ignored."""
    assert constraints.split(",").count("=r") == pack
    assert constraints.count(",") + 1 == pack * (1 + len(values))
    shape = values[0].data.shape
    run(text, [np.broadcast_to(value.data, shape).reshape(-1) for value in values], pack)
    return SimpleNamespace(get_result=lambda index: values[0])
