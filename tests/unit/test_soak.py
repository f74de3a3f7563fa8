"""Test the soak's command line and how its injector finds the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import __main__ as soak
from tests.support.injection import driver_pids


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_a_soak_without_episodes_is_refused(
    minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["soak", "--minutes", minutes])
    with pytest.raises(SystemExit, match="2"):
        soak.main()
    assert f"--minutes={minutes}: must be more than 0" in capsys.readouterr().err


def test_the_driver_is_found_by_its_lock(tmp_path: Path) -> None:
    assert driver_pids(tmp_path) == []
    (tmp_path / "driver.lock").write_text("process 41 on this machine\n")
    assert driver_pids(tmp_path) == [41]
