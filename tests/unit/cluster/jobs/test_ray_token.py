"""Test to which clusters the token of Ray's jobs is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.errors import SchedulerError
from cluster.jobs.tracked import check_no_unfinished_job, describe_newest_job
from cluster.run_folder.submitted_jobs import FOLDER, SubmittedJob, record_job
from conf.schema.submit import SubmitConfig


@contextmanager
def server() -> Iterator[tuple[int, list[str | None]]]:
    """Serve HTTP on this machine; yield the port and the list of received authorisations."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield http.server_address[1], seen
    finally:
        http.shutdown()
        http.server_close()


def test_a_run_folder_does_not_decide_where_a_token_is_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-token")
    (tmp_path / FOLDER).mkdir()
    with server() as (port, seen):
        # By another name of this machine, so that the request would arrive.
        address = f"http://127.1:{port}"
        record_job(SubmittedJob(tmp_path, "ray", "raysubmit_1", 0.0, [], {"address": address}))
        with pytest.raises(SchedulerError, match=f"set submit.address={address} if you trust it"):
            check_no_unfinished_job(tmp_path, SubmitConfig())
        assert "if you trust it" in str(describe_newest_job(tmp_path, SubmitConfig()))
        assert seen == []
        # The same cluster, named by the user, and any cluster on this machine, are asked.
        local = f"http://127.0.0.1:{port}"
        record_job(SubmittedJob(tmp_path, "ray", "raysubmit_2", 0.0, [], {"address": local}))
        assert "if you trust it" not in str(describe_newest_job(tmp_path, SubmitConfig()))
        assert set(seen) == {"Bearer the-token"}
