"""A hub on this machine, for a process of a test: it answers as much of the hub's API as making a repository, sending files and
fetching them needs, and knows one token."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import transformers
from huggingface_hub import constants, hf_api

TOKEN, CLOSED = "hf_of_tests", "tester/closed"


class Hub(ThreadingHTTPServer):
    """``files``: of each repository, by its whole name, the bytes by path; ``private``: those that are. To one that is called
    ``CLOSED`` nothing can be sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            self.server.files.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            return self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main.*", self.path).groups()
        if name == CLOSED:
            return self._json({"error": "this repository\nis closed"}, 403)
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self._json({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._json({"success": True, "commitOid": self._sha(name), "commitUrl": f"{self.server.url}/{name}/commit/1"})

    def do_GET(self):
        path = self.path.partition("?")[0]
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/[^/]+|/revision/[^/]+|)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not about and not file:
            return self._json({"error": f"no {path} here"}, 401)
        name = (about or file)[1]
        if name not in self.server.files:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = self.server.files[name]
        if file:
            content = files.get(file[2])
            if content is None:
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self._send(content, 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": self._sha(name)})
        if about[2].startswith("/tree"):
            return self._json([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()])
        siblings = [{"rfilename": p} for p in files]
        return self._json({"id": name, "sha": self._sha(name), "siblings": siblings, "tags": [], "private": False})

    do_HEAD = do_GET

    def _sha(self, name: str) -> str:
        return _oid(repr(sorted(self.server.files[name].items())).encode())

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub():
    """Serves in a thread of this process."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def use(url: str, cache: str, token: str | None = TOKEN) -> None:
    """Let this process's hub clients talk to ``url``; the libraries have read their environment already."""
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = cache, False, True
    constants.HF_TOKEN_PATH = os.path.join(cache, "no token")
    hf_api.api.endpoint = url
    transformers.utils.hub._hf_api = None
