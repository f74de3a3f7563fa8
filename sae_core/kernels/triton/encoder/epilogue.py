"""Epilogues of the encoder product: append the keys of a tile's values above a limit to pools.

Each appends the same keys. "Above" is computed as "not at most", so that NaN is appended; a maximum
would silently drop it.
"""

# Triton ships no types, and kernel arguments have none that mypy understands.
# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from sae_core.kernels.triton.encoder.select import pack_key

NONE = tl.constexpr(0x7FFFFFFF)
"""Larger than every latent."""
PACK = tl.constexpr(4)
"""Values of a thread that one instance of `INLINE` handles."""
_OPERANDS = {
    **{"value": "f", "limit": "f", "row": "r", "latent": "r"},
    **{"counts": "l", "pool": "l", "end": "r", "width": "r"},
}
"""Operands of each value with their constraints. Rows that do not exist are negative."""
CONSTRAINTS = tl.constexpr(
    ",".join(["=r"] * PACK.value + [kind for kind in _OPERANDS.values() for _ in range(PACK.value)])
)
# The group's vote needs only one predicate, so the comparisons are combined with "or".
_COMPARE = """
    setp.gtu{also}.f32 some, {value}, {limit}{before};"""
_APPEND = """
    setp.gtu.f32 hit, {value}, {limit};
    vote.sync.any.pred some, hit, 0xffffffff;
    @!some bra.uni NEXT{i};
    setp.ge.and.s32 hit, {row}, 0, hit;
    setp.lt.and.s32 hit, {latent}, {end}, hit;
    mov.b32 slot, {width};
    mul.wide.s32 offset, {row}, 4;
    add.s64 address, {counts}, offset;
    @hit atom.global.relaxed.gpu.add.u32 slot, [address], 1;
    setp.lt.u32 hit, slot, {width};
    mov.b32 bits, {value};
    setp.nan.f32 p, {value}, {value};
    @p and.b32 bits, bits, 0x7fffffff;
    setp.eq.f32 p, {value}, 0f00000000;
    @p mov.b32 bits, 0;
    shr.s32 mask, bits, 31;
    and.b32 mask, mask, 0x7fffffff;
    xor.b32 bits, bits, mask;
    xor.b32 low, {latent}, 0x7fffffff;
    mov.b64 key, {{low, bits}};
    mul.wide.s32 offset, {row}, {width};
    cvt.u64.u32 address, slot;
    add.s64 offset, offset, address;
    shl.b64 offset, offset, 3;
    add.s64 address, {pool}, offset;
    @hit st.global.b64 [address], key;
NEXT{i}:"""
_RESULT = """
    mov.b32 ${i}, 0;"""


def _for_each_value(template: str) -> str:
    """Return PTX that repeats the template for each value that an instance handles.

    The results, which are unused, are operands 0 to `PACK` - 1. The registers of each operand
    follow in the order of `_OPERANDS`.
    """
    pack = PACK.value
    return "".join(
        template.format(
            i=i,
            also=".or" if i else "",
            before=", some" if i else "",
            **{name: f"${pack * j + i}" for j, name in enumerate(_OPERANDS, 1)},
        )
        for i in range(pack)
    )


INLINE = tl.constexpr(
    f"""{{
    .reg .pred hit, some, p;
    .reg .b32 slot, bits, mask, low;
    .reg .b64 offset, address, key;\
{_for_each_value(_COMPARE)}
    vote.sync.any.pred some, some, 0xffffffff;
    @!some bra.uni DONE;\
{_for_each_value(_APPEND)}
DONE:\
{_for_each_value(_RESULT)}
}}"""
)
"""PTX of `append_inline` for `PACK` values of a thread.

The votes make the branches uniform within a warp. A branch per thread would take two instructions
instead of a vote, to join the threads again. After the group's branch, a second one per value skips
those without a hit, because an append takes some 25 issue slots. The bounds are checked last,
because NaN outside the matrix passes the comparison, too.
"""


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Split a tile's columns into a left and a right half."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Split a tile's columns into four parts, from left to right."""
    left, right = _halves(tile, BM, BN)
    first, second = _halves(left, BM, BN // 2)
    third, fourth = _halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def append_all(tile, rows, row_lives, latents, live, limit, pool, counts, width):
    """Append the keys of all values above the limit at once, for tiles with many."""
    hit = (tile <= limit[:, None]) == 0
    hit = hit & row_lives[:, None] & live[None, :]
    counters = counts + rows[:, None] + tl.zeros_like(latents)[None, :]
    slot = tl.atomic_add(counters, 1, mask=hit, sem="relaxed")
    keys = pack_key(tile, latents[None, :])
    place = pool + rows.to(tl.int64)[:, None] * width + slot
    tl.store(place, keys, mask=hit & (slot < width))


@triton.jit
def append_few(tile, rows, row_lives, latents, live, limit, pool, counts, width):
    """Append the keys of values above the limit, one per row at a time, for tiles with few."""
    # Latents that do not exist become `NONE`, and so does the result of rows that do not.
    latent = tl.where(live, latents, NONE)[None, :]
    found = _first_above(tile, latent, limit, row_lives)
    while tl.min(found, 0) < NONE:
        here = latent == found[:, None]
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        hit = found < NONE
        slot = tl.atomic_add(counts + rows, 1, mask=hit, sem="relaxed")
        place = pool + rows.to(tl.int64) * width + slot
        tl.store(place, pack_key(value, found), mask=hit & (slot < width))
        # Remove the value from the tile: recording it separately would need twice the registers.
        tile = tl.where(here, float("-inf"), tile)
        found = _first_above(tile, latent, limit, row_lives)


@triton.jit
def _first_above(tile, latent, limit, row_lives):
    """Return each row's first latent with a value above the limit, or `NONE`."""
    first = tl.min(tl.where(tile <= limit[:, None], NONE, latent), 1)
    return tl.where(row_lives, first, NONE)


@triton.jit
def append_inline(tile, rows, row_lives, latents, end, limit, pool, counts, width):
    """Append the keys of values above the limit, with one branch per `PACK` values, in inline PTX.

    Latents from `end` on do not exist. Each thread must hold a multiple of `PACK` values of the
    tile, because the compiler fills an incomplete group with undefined ones.

    Groups at most the limit in all threads of a warp take 1.5 issue slots per value, and no
    reduction over the tile is needed. Triton has no branch per element, hence PTX; its interpreter
    cannot run it.
    """
    tl.inline_asm_elementwise(
        INLINE,
        CONSTRAINTS,
        [
            tile, limit[:, None], tl.where(row_lives, rows, -1)[:, None], latents[None, :],
            counts.to(tl.int64), pool.to(tl.int64), end, width,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=PACK,
    )  # fmt: skip
