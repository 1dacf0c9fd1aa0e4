"""A small stand-in for the hub's HTTP API on 127.0.0.1: the part that huggingface_hub needs to upload and read a model.

Repositories are dicts in memory; a file is its bytes or a path. Large files are uploaded by Git LFS (`batch`, then one
PUT each), as the hub has clients without Xet do. A download of a large file is redirected to a second server, as the
hub redirects to its CDN. The stand-in records every request, token and byte sent.
"""

import base64
import hashlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0" * 40
# A token that only the stand-in may see.
TOKEN = "hf_" + "PlantedSecretOfATest"


@dataclass
class Hub:
    """`repos`: name -> path -> bytes. `blobs`: what LFS holds, by SHA-256. `puts`: LFS uploads that came in, in order.
    `before_put` is called with their number; a status that it gives is answered in place of storing. `gated`: whose
    files are given to nobody. `ranges`: whether the CDN knows byte ranges. `served`: file -> bytes of it that went out;
    `fetched`: what the CDN was asked for, in order."""

    endpoint: str = ""
    cdn: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    served: Counter[str] = field(default_factory=Counter)
    fetched: list[str] = field(default_factory=list)
    cdn_tokens: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    token: str | None = None
    before_put: Callable[[int], int | None] = lambda number: None


def _digest(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()}"'


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
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
        if found := re.match(rf"/api/models/([^/]+/[^/]+)/tree/(?:main|{COMMIT})", self.path):
            self._answer(200, [self._entry(path, data) for path, data in self.hub.repos[found[1]].items()])
        elif found := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            siblings = [{"rfilename": path} for path in self.hub.repos.get(found[1], ())]
            told = {"id": found[1], "sha": COMMIT, "siblings": siblings}
            self._answer(*((200, told) if found[1] in self.hub.repos else (404, {}, {"X-Error-Code": "RepoNotFound"})))
        else:
            self._resolve()

    def do_HEAD(self) -> None:
        if self._may():
            self._resolve()

    def _resolve(self) -> None:
        """Sends a small file, or redirects to the CDN for a large one."""
        found = re.match(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", self.path)
        if found is None or found[2] not in self.hub.repos.get(found[1], {}):
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        elif found[1] in self.hub.gated:
            self._answer(403, {}, {"X-Error-Code": "GatedRepo"})
        elif _is_large(found[2]):
            data = self.hub.repos[found[1]][found[2]]
            # Files given by path are too large for a client to download whole.
            told = {} if isinstance(data, Path) else {"X-Linked-Size": str(len(data)), "X-Linked-Etag": _digest(data)}
            where = f"{self.hub.cdn}/{found[1]}/{found[2]}"
            self._answer(302, {}, {"Location": where, "X-Repo-Commit": COMMIT, **told})
        else:
            data = self.hub.repos[found[1]][found[2]]
            self.hub.served[found[2]] += len(data) * (self.command == "GET")
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self._answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": etag})

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


class _Cdn(BaseHTTPRequestHandler):
    """Sends large files, in ranges or whole, to anybody."""

    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        owner, name, path = self.path.lstrip("/").split("/", 2)
        self.hub.cdn_tokens.add(self.headers.get("Authorization") or "")
        self.hub.fetched.append(path)
        data = self.hub.repos[f"{owner}/{name}"][path]
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if self.hub.ranges else None
        begin, stop = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - begin))
        self.end_headers()
        with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            file.seek(begin)
            while begin < stop:
                piece = file.read(min(2**16, stop - begin))
                try:
                    self.wfile.write(piece)
                except OSError:  # the client hung up
                    return
                begin += len(piece)
                self.hub.served[path] += len(piece)


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler], hub: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub and its CDN in threads."""
    hub = Hub()
    with _running(_Handler, hub) as hub.endpoint, _running(_Cdn, hub) as hub.cdn:
        yield hub


def take_place(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """huggingface_hub talks to the stand-in, with an empty cache under `folder` and TOKEN in the environment."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
