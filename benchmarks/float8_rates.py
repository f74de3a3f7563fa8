"""Measure how many rows the float8 prefilter certifies, with its product emulated on the CPU.

    python -m benchmarks.float8_rates [--rows N] [--store PATH] [--json FILE]

Rows and dictionaries are normally distributed, or the rows are sparse sums of dictionary rows plus
noise. With `--store`, dictionaries are also trained on the store's first array, which then provides
the rows. All inputs are rounded to bfloat16, as in a training step on a GPU.

Products of float8 and bfloat16 numbers are computed in float32, from the same split rows and bounds
as on a GPU. The truncation of the device's float8 sums is not emulated: it would change a value by
no more than the bound that the values contain.

Each row gives the share of certified rows for several numbers of candidates per selected latent and
three bounds on the truncation of float8 sums: the shipped one, the strict one, and the strict one
with sums promoted to float32 after 64 instead of 128 columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from activation_store import open_store
from benchmarks import quality
from benchmarks.harness.one_rank import start_one_rank
from benchmarks.harness.table import format_table, write_json
from sae_core.architectures.topk.settings import topk_settings
from sae_core.kernels.prefilter import n_float8_candidates
from sae_core.kernels.triton.prefilter_float8 import (
    SUM_UNIT,
    SplitRows,
    SplitSpec,
    dequantise,
    split_rows,
    split_spec,
    sum_weights,
)

PER_K = (3, 4, 5, 6, 7, 8)
BOUNDS = ("shipped", "strict", "strict, promoted each 64")
SHAPES = ((131_072, 768, 32), (131_072, 4096, 64))
PIECE_BYTES = 128 << 20
COLUMNS = ("work", "op", "certified", "wrong", "second_round", "most_error", "deviation_share")


@dataclass(frozen=True)
class Case:
    """Rows and a dictionary whose TopK is selected.

    Args:
        name: Kind of data.
        x: [B, D] float32 rows.
        n_latents: L.
        k: Number of latents to select.
        dictionary: Rows of the encoder, [L, D]; None for normally distributed rows of unit norm.
        bias: [L]; None for zeros.
    """

    name: str
    x: torch.Tensor
    n_latents: int
    k: int
    dictionary: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield consecutive encoder rows, rounded to bfloat16, as float32, and their biases."""
        size = PIECE_BYTES // (4 * self.x.shape[1])
        bias = torch.zeros(self.n_latents) if self.bias is None else self.bias
        for start in range(0, self.n_latents, size):
            stop = min(start + size, self.n_latents)
            if self.dictionary is None:
                rows = unit_rows(start, stop - start, self.x.shape[1])
            else:
                rows = self.dictionary[start:stop]
            yield rows.bfloat16().float(), bias[start:stop]


def main() -> None:
    """Measure all cases, print the table and write it with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of each case")
    parser.add_argument("--store", help="path of a store whose rows to use as well")
    parser.add_argument(
        "--trained",
        nargs="+",
        default=["4096:1000000", "131072:100000"],
        metavar="L:TOKENS",
        help="latents and training tokens of each dictionary trained on the store",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    for case in cases(options.rows, options.store, options.trained):
        rows.append(measure(case))
        print(format_table(rows, COLUMNS), flush=True)
    if options.json:
        write_json(options.json, rows)


def cases(n_rows: int, store: str | None, trained: list[str]) -> Iterator[Case]:
    """Yield all cases."""
    for L, D, k in SHAPES:
        yield Case("gaussian", normal(0, n_rows, D), L, k)
        yield planted(n_rows, L, D, k)
    for each in trained if store else ():
        n_latents, tokens = map(int, each.split(":"))
        yield real(str(store), n_rows, n_latents, tokens)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_rows(seed: int, n: int, D: int) -> torch.Tensor:
    """Return random rows of unit norm, [n, D]."""
    return torch.nn.functional.normalize(normal(1000 + seed, n, D), dim=1)


def planted(n_rows: int, L: int, D: int, k: int) -> Case:
    """Return rows that are sums of k dictionary rows with strengths of 0.2 and more, plus noise.

    The strengths are exponentially distributed, so that the weakest drown in the interference of
    the others.
    """
    generator = torch.Generator().manual_seed(1)
    active = torch.randint(0, L, (n_rows, k), generator=generator)
    strengths = torch.empty(n_rows, k).exponential_(generator=generator) + 0.2
    x = 0.02 * normal(2, n_rows, D)
    start = 0
    for W, _ in Case("", x, L, k).pieces():
        inside = (active >= start) & (active < start + len(W))
        rows, slots = inside.nonzero(as_tuple=True)
        x.index_add_(0, rows, strengths[rows, slots, None] * W[active[rows, slots] - start])
        start += len(W)
    return Case("planted sparse", x * D**0.5 / x.norm(dim=1).mean(), L, k)


def real(store: str, n_rows: int, n_latents: int, tokens: int) -> Case:
    """Train a dictionary on a store's first array, and return it with some of its rows."""
    start_one_rank()
    config = quality.base_config(n_latents, tokens, dead_after_tokens=tokens)
    trainer, row = quality.train(open_store(store), config, "stock, fused update")
    dist.destroy_process_group()
    sae = trainer.engine.sae
    x = (sae.normalise(trainer.source.sample(n_rows)) - sae.b_dec).detach()
    name = f"real, trained on {tokens:,} tokens, FVU {row['fvu']:.3f}"
    W, b = sae.W_enc.detach(), sae.b_enc.detach()
    return Case(name, x, n_latents, topk_settings(sae.config).k, W, b)


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    """Return the row of one case.

    `certified`: share of rows certified with the shipped bounds and number of candidates.
    `certified_by`: the same by bound and candidates per selected latent.
    `wrong`: certified rows whose candidates lack one of the k largest latents; must be 0.
    `second_round`: mean number of candidates per selected latent in the second round of rescoring.
    `most_error`: largest error of the product, rounding only, relative to its bound.
    `deviation_share`: root mean square of the error relative to its bound.
    """
    x = case.x.bfloat16().float()
    n_kept = max(PER_K) * case.k
    exact_best = torch.full((len(x), case.k), -torch.inf)
    kept = {bound: torch.full((2, len(x), n_kept), -torch.inf) for bound in BOUNDS}
    most_error, squares, specs = 0.0, 0.0, None
    for W, b in case.pieces():
        if specs is None:
            specs = split_spec(x, W if case.dictionary is None else case.dictionary)
            low_x = split_rows(x, specs[0])
        exact = x @ W.T + b
        uppers, ratios = _upper_bounds(low_x, split_rows(W, specs[1]), specs[0], exact, b)
        most_error = max(most_error, float(ratios.abs().max()))
        squares += float(ratios.square().sum()) / (len(x) * case.n_latents)
        exact_best = torch.cat((exact_best, exact), 1).topk(case.k, dim=1).values
        for bound, upper in uppers.items():
            both = torch.cat((kept[bound], torch.stack((upper, exact))), 2)
            best = both[0].topk(n_kept, dim=1).indices
            kept[bound] = both.gather(2, best.expand(2, -1, -1))
    count = n_float8_candidates(x.shape[1], case.n_latents, case.k)
    upper, found = kept["shipped"][:, :, :count]
    kth = found.topk(case.k, dim=1).values[:, -1]
    first = found[:, : 2 * case.k].topk(case.k, dim=1).values[:, -1]
    certified = kth >= upper[:, -1]
    return {
        "work": {"L": case.n_latents, "D": x.shape[1], "B": len(x), "k": case.k},
        "system": "ours",
        "op": case.name,
        "candidates": count,
        "certified": float(certified.float().mean()),
        "certified_by": {bound: _shares(kept[bound], case.k) for bound in BOUNDS},
        "wrong": int((certified & (kth < exact_best[:, -1])).sum()),
        "second_round": float(
            (upper[:, 2 * case.k :] >= first[:, None]).sum(1).float().mean() / case.k
        ),
        "most_error": most_error,
        "deviation_share": squares**0.5,
    }


def _upper_bounds(
    x: SplitRows, W: SplitRows, spec: SplitSpec, exact: torch.Tensor, b: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the upper bounds [B, n] by name, and rounding error / bound on it, [B, n]."""
    columns_x, columns_W = dequantise(x), dequantise(W)
    product = columns_x[:, :-2] @ columns_W[:, :-2].T + b
    rounding = columns_x[:, -2, None] * columns_W[:, -2]
    shipped = columns_x[:, -1, None] * columns_W[:, -1]
    n_low = len(spec.channels) - spec.n_side

    def strict(promoted: int) -> torch.Tensor:
        factors = [
            sum_weights(rows.low[:, :n_low].float(), promoted).sqrt() * rows.scales
            for rows in (x, W)
        ]
        return SUM_UNIT * factors[0][:, None] * factors[1]

    upper = product + rounding
    uppers = (upper + shipped, upper + strict(128), upper + strict(64))
    return dict(zip(BOUNDS, uppers, strict=True)), (product - exact) / rounding


def _shares(kept: torch.Tensor, k: int) -> dict[str, float]:
    """Return the share of certified rows by number of candidates per selected latent."""
    shares = {}
    for per_k in PER_K:
        upper, found = kept[:, :, : per_k * k]
        kth = found.topk(k, dim=1).values[:, -1]
        shares[str(per_k)] = float((kth >= upper[:, -1]).float().mean())
    return shares


if __name__ == "__main__":
    main()
