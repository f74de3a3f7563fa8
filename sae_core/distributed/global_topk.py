"""Exact global TopK over a dictionary whose rows are split among the ranks of a latent group.

Weights are never sent. Each of the G ranks selects its k best candidates of every token. An
all-to-all gives rank r the candidates of the r-th share of the tokens, so that a rank receives B k
candidates instead of the G B k of an all-gather. Rank r merges them and sends each token's k-th key
to all ranks. A candidate is selected if its key is not below the k-th key. Keys are unique, so
exactly k are selected.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sae_core.distributed.mesh import row_range
from sae_core.kernels.keys import EMPTY_KEY, pack_keys


def select_global(
    values: torch.Tensor,
    latents: torch.Tensor,
    k: int,
    first_latent: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Mark the local candidates that are among each token's k largest over all shards; collective.

    Args:
        values: [B, C] float32 local candidates; `-inf` means an empty slot. C must be the same on
            every rank.
        latents: [B, C] int64, local to the shard.
        k: Number selected per token; ties go to the lowest global index.
        first_latent: Global index of this shard's first row.
        group: Ranks that share the dictionary; with None or a single rank, nothing is exchanged.

    Returns:
        [B, C] bool, True for selected candidates.
    """
    keys = pack_keys(values, latents + first_latent)
    keys = keys.masked_fill(values == float("-inf"), EMPTY_KEY)
    if group is None or dist.get_world_size(group) == 1:
        if keys.shape[1] <= k:
            return keys != EMPTY_KEY
        threshold = keys.topk(k, dim=1).values[:, -1]
    else:
        threshold = _kth_keys(keys, k, group)
    return (keys >= threshold[:, None]) & (keys != EMPTY_KEY)


def sent_bytes(n_rows: int, width: int, n_ranks: int, rank: int) -> int:
    """Return the number of bytes that one rank sends per call to `select_global`.

    Protocol overhead is not counted. A rank sends B (1 - 1/G) rows of C keys, plus the k-th keys
    of its own share of the tokens. The latter are sent to every other rank, padded to the size of
    the largest share.

    Args:
        n_rows: B, rows of the batch.
        width: C, candidates per rank and row.
        n_ranks: G, number of ranks that share the dictionary.
        rank: The sender's rank among them.
    """
    start, stop = row_range(n_rows, rank, n_ranks)
    largest = row_range(n_rows, 0, n_ranks)[1]
    return 8 * ((n_rows - (stop - start)) * width + largest * (n_ranks - 1))


def _kth_keys(keys: torch.Tensor, k: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return each token's k-th largest key over all ranks, [B]; EMPTY_KEY if fewer exist."""
    B, C = keys.shape
    n_ranks = dist.get_world_size(group)
    rank = dist.get_rank(group)
    shares = [row_range(B, r, n_ranks) for r in range(n_ranks)]
    sent = [(stop - start) * C for start, stop in shares]
    mine = shares[rank][1] - shares[rank][0]
    received = keys.new_empty(n_ranks * mine * C)
    dist.all_to_all_single(received, keys.reshape(-1), [mine * C] * n_ranks, sent, group=group)
    merged = received.view(n_ranks, mine, C).transpose(0, 1).reshape(mine, n_ranks * C)
    share_size = shares[0][1]  # the largest share; the others are padded to it
    kth = keys.new_full((share_size,), EMPTY_KEY)
    kth[:mine] = merged.topk(min(k, n_ranks * C), dim=1).values[:, -1]
    gathered = keys.new_empty(n_ranks * share_size)
    dist.all_gather_into_tensor(gathered, kth, group=group)
    return gathered[:B]
