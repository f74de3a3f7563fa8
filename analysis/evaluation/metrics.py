"""The evaluation metrics: names and definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


METRIC_NAMES = (
    "fvu",
    "mse",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_recon",
    "ce_zero",
    "ce_mean",
    "ce_recovered",
    "ce_recovered_mean",
    "kl",
    "tokens",
)
"""Keys of eval/metrics.json, in the order in which pages and cards show them."""
SPLICED = ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")
DEFINITIONS = {
    "fvu": "fraction of variance unexplained: sum |x - recon|^2 / sum |x - mean|^2 in raw "
    "activation units, where mean is the mean of the same rows; counts the rows that a store keeps "
    "(not position 0, and no special tokens if data.drop_special_tokens is set)",
    "mse": "mean of (x - recon)^2 over the same rows and all dimensions, in raw activation units",
    "l0": "mean number of latents above 0 per row, over the same rows",
    "dead_fraction": "fraction of latents that are above 0 on none of the training rows stored at "
    "store.path (with cluster.retention=consumed: on none of the rows not yet deleted)",
    "ce_clean": "next-token cross-entropy of the unmodified model in nats, over predictions from "
    "position 1 on",
    "ce_recon": "cross-entropy with the SAE spliced in at every position except 0",
    "ce_zero": "cross-entropy with zeros spliced in at the same positions",
    "ce_mean": "cross-entropy with the mean of the training rows stored at store.path spliced in "
    "at the same positions",
    "ce_recovered": "(ce_zero - ce_recon) / (ce_zero - ce_clean)",
    "ce_recovered_mean": "(ce_mean - ce_recon) / (ce_mean - ce_clean)",
    "kl": "mean over predictions of KL(clean || recon), in nats",
    "tokens": "number of tokens evaluated, including BOS; without held-out text, the number of "
    "stored rows",
}
