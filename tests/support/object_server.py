"""A private S3 server on 127.0.0.1, and a proxy in front of it that can inject faults."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.ranks import free_port

Fault = str | None
"""A fault to inject into one request; None forwards the request unchanged.

drop: close the connection without forwarding the request. 500, 403: return this status without
forwarding the request. lost: forward the request, but do not return the reply. cut: return half of
the reply. slow: return the reply in small pieces. strip: forward the request without its
`If-None-Match` condition.
"""
Rule = Callable[[str, str], Fault]
"""Method, path -> fault for this request."""


@contextmanager
def s3_server() -> Iterator[int]:
    """Run a moto server during the block; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    "the S3 server did not start"
                )
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def make_bucket(port: int, bucket: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=10).read()


class Proxy:
    """A proxy in front of the server; `rule` chooses the fault of each request.

    Args:
        upstream: Port of the server.
    """

    def __init__(self, upstream: int) -> None:
        self.rule: Rule = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Send small replies as one packet. A second packet would wait for an acknowledgement.
            wbufsize = -1
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def handle_one(self) -> None:
                proxy._handle(self, upstream)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, client: BaseHTTPRequestHandler, upstream: int) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        self.requests.append((client.command, client.path))
        fault = self.rule(client.command, client.path)
        if fault == "drop":
            return _hang_up(client)
        if fault in ("500", "403"):
            client.send_response(int(fault))
            client.send_header("Content-Length", "0")
            client.end_headers()
            return None
        headers = dict(client.headers.items())
        if fault == "strip":
            headers = {key: v for key, v in headers.items() if key.lower() != "if-none-match"}
        connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        connection.request(client.command, client.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            return _hang_up(client)
        client.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                client.send_header(key, value)
        length = answer.getheader("Content-Length") if client.command == "HEAD" else len(content)
        client.send_header("Content-Length", str(length))
        client.end_headers()
        pieces = [content]
        if fault == "slow":
            step = max(len(content) // 10, 1)
            pieces = [content[start : start + step] for start in range(0, len(content), step)]
        if fault == "cut":
            pieces = [content[: len(content) // 2]]
        for piece in pieces:
            client.wfile.write(piece)
            client.wfile.flush()
            if fault == "slow":
                time.sleep(0.02)
        return _hang_up(client) if fault == "cut" else None


def _hang_up(client: BaseHTTPRequestHandler) -> None:
    client.close_connection = True
    client.wfile.flush()
    client.connection.shutdown(socket.SHUT_RDWR)
