"""Names of training metrics are unique, also among those that an architecture adds."""

from __future__ import annotations

import pytest

from sae_core.training_metrics import TRAINING_METRICS, TrainingMetric, mean_over_steps, with_own


@pytest.mark.parametrize("name", ["tokens", "fvu", "own"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    own = TrainingMetric("own", "", "a sum", mean_over_steps("own"))
    other = TrainingMetric(name, "", "another sum", mean_over_steps("own"))
    with pytest.raises(ValueError, match=rf"\['{name}'\]: expected names that are not used yet"):
        with_own((own, other))
    assert len(with_own((own,))) == len(TRAINING_METRICS) + 1
