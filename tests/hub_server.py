"""A small hub on loopback: what the real client asks one for, no more."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by ``org/name``, each ``{file: bytes}``; a name in ``gated`` needs a login."""

    def __init__(self, repositories, gated=()):
        self.repositories, self.gated, self.asked = repositories, gated, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path):
        """Status, headers and content."""
        parts = urlsplit(path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = self.repositories[repo]
        if rest and rest[1] not in ("main", SHA):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api and rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": n, "size": len(c), "oid": _etag(c)}
                for n, c in files.items()
            ]
            return 200, {}, json.dumps(listed).encode()
        if api:
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode()
        content = files["/".join(rest[2:])]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": SHA}, content

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, content = hub.answer(self.path)
                if self.command == "GET" and "/resolve/" in self.path:
                    hub.asked.append(self.path.rpartition("/")[2])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        return Handler


def _etag(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
