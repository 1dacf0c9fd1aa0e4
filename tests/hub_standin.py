"""A small stand-in of the hub's HTTP API on 127.0.0.1: what an upload through huggingface_hub asks for, and no more.

Repositories are dicts in memory. Large files go by Git LFS (`batch`, then a PUT each), as the hub has it for clients
without Xet. What was asked is kept, with the token that came along, for the tests to look at.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """`repos`: name -> path -> bytes. `blobs`: what LFS holds, by SHA-256. `puts`: LFS uploads that came in, in order.
    `before_put` is called with their number; a status that it gives is answered in place of storing."""

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    token: str | None = None
    before_put: Callable[[int], int | None] = lambda number: None


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, value: Any = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _may(self) -> bool:
        self.hub.asked.append((self.command, self.path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.tokens.add(token)
        if self.hub.token is not None and token != self.hub.token:
            self._answer(401, {"error": "Invalid credentials"})
            return False
        return True

    def do_GET(self) -> None:
        if not self._may():
            return
        if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/main", self.path):
            self._answer(200, [self._entry(path, data) for path, data in self.hub.repos[found[1]].items()])
        elif found := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            self._answer(200, {"id": found[1], "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, {"error": self.path})

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry | ({"lfs": lfs} if _is_large(path) else {})

    def do_POST(self) -> None:
        body = self._body()
        if not self._may():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            exists = repo in self.hub.repos
            if not exists:
                self.hub.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
                self.hub.private[repo] = asked.get("visibility") == "private"
            self._answer(409 if exists else 200, {"url": f"{self.hub.endpoint}/{repo}"})
        elif self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            bad = [] if "base_model_relation: quantized" in content else [{"message": "no base_model_relation"}]
            self._answer(400 if bad else 200, {"errors": bad, "warnings": []})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if _is_large(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
                objects.append(item | ({} if item["oid"] in self.hub.blobs else {"actions": action}))
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": self.path})

    def _commit(self, repo: str, operations: list[dict[str, Any]]) -> None:
        files, touched = self.hub.repos[repo], []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            touched += [value["path"]] if "path" in value else []
        self.hub.commits.append(touched)
        oid = f"{len(self.hub.commits):040x}"
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.removeprefix("/lfs/")
        status = self.hub.before_put(len(self.hub.puts))
        if status is None:
            assert hashlib.sha256(data).hexdigest() == oid
            self.hub.blobs[oid] = data
            self.hub.puts.append(oid)
        self._answer(status or 200, {})


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that runs in a thread."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
