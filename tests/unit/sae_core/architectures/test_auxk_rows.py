"""Test the rule that chooses the rows of the auxiliary loss from the sizes of a run."""

from __future__ import annotations

import pytest

from sae_core.architectures.topk.settings import MOST_AUX_PAIRS, TopKConfig


@pytest.mark.parametrize(
    ("d_model", "batch_tokens", "share"),
    [
        (576, 2048, 1.0),  # the demo
        (768, 1 << 15, 1.0),
        (768, 1 << 17, 1 / 4),
        (4096, 1 << 15, 1 / 8),
        (4096, 1 << 17, 1 / 32),
    ],
)
def test_the_rows_follow_from_the_sizes(d_model, batch_tokens, share):
    config = TopKConfig(n_latents=1 << 20)
    assert config.auxk_rows is None
    resolved = config.resolved(d_model, batch_tokens, 10**9)
    assert resolved.auxk_rows == share
    path = resolved.auxiliary_path(d_model)
    assert path is not None and path.latents * share * batch_tokens <= MOST_AUX_PAIRS
    assert share == 1 or path.latents * 2 * share * batch_tokens > MOST_AUX_PAIRS


def test_a_number_is_kept():
    assert TopKConfig(auxk_rows=0.75).resolved(4096, 1 << 20, 10**9).auxk_rows == 0.75


def test_a_dictionary_smaller_than_auxk_has_fewer_pairs():
    config = TopKConfig(n_latents=64, k=4, auxk=1 << 14)
    assert config.resolved(4096, 1 << 17, 10**9).auxk_rows == 1.0
