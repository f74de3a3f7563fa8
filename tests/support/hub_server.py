"""A server on this machine that answers like the Hugging Face Hub, for data sets in folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"
API = "/api/datasets/"
FILES = "/datasets/"


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """Serve the data sets `root/org/name`, all at the commit `COMMIT`, and yield the address."""

    class Handler(_Handler):
        folder = root

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer requests for information and files."""
        self._answer(b"")

    def do_HEAD(self) -> None:
        """Answer like GET, without the content."""
        self._answer(b"")

    def do_POST(self) -> None:
        """Answer questions about several paths."""
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        prefix = API if path.startswith(API) else FILES
        if not path.startswith(prefix):
            self._error("EntryNotFound")
            return
        organisation, name, *rest = path.removeprefix(prefix).split("/")
        repository = f"{organisation}/{name}"
        if not (self.folder / repository).is_dir():
            self._error("RepoNotFound")
        elif prefix == FILES:
            self._file(self.folder / repository / "/".join(rest[2:]))
        elif rest and rest[0] not in ("revision", "tree", "paths-info"):
            self._error("EntryNotFound")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self._error("RevisionNotFound")
        elif rest and rest[0] == "tree":
            self._json(self._tree(repository, "/".join(rest[2:])))
        elif rest and rest[0] == "paths-info":
            paths = _paths(body, self.headers.get("Content-Type", ""))
            self._json([one for one in self._everything(repository) if one["path"] in paths])
        else:
            siblings = [
                {"rfilename": one["path"]}
                for one in self._everything(repository)
                if one["type"] == "file"
            ]
            self._json(
                {
                    "id": repository,
                    "_id": "1",
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": siblings,
                }
            )

    def _everything(self, repository: str) -> list[dict[str, Any]]:
        root = self.folder / repository
        entries = []
        for one in sorted(root.rglob("*")):
            entry = {"path": one.relative_to(root).as_posix(), "oid": _oid(one), "size": 0}
            if one.is_dir():
                entry["type"] = "directory"
            else:
                entry |= {"type": "file", "size": one.stat().st_size}
            entries.append(entry)
        return entries

    def _tree(self, repository: str, inside: str) -> list[dict[str, Any]]:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0]
        prefix = f"{inside}/" if inside else ""
        found = [one for one in self._everything(repository) if one["path"].startswith(prefix)]
        if recursive.lower() in ("true", "1"):
            return found
        return [one for one in found if "/" not in one["path"].removeprefix(prefix)]

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._error("EntryNotFound")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if not wanted:
            self._send(200, content, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        self._send(206, content[int(first) : stop], headers)

    def _error(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _paths(body: bytes, content_type: str) -> list[str]:
    if "json" in content_type:
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else list(paths)
    return parse_qs(body.decode()).get("paths", [])


def _oid(file: Path) -> str:
    content = file.read_bytes() if file.is_file() else b""
    return hashlib.sha1(file.name.encode() + content).hexdigest()
