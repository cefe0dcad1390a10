"""A small Hub on loopback, with what huggingface_hub needs to download, and ways to misbehave.

    with Hub() as hub:
        commit = hub.add("models", "org/name", {"config.json": b"{}"})
        hub.misbehave("cut", "model.safetensors", times=1)
        subprocess.run([...], env=hub.environment(tmp_path / "home"))

Repositories live in memory: a commit maps paths to bytes (or to files on disk), a branch names a
commit.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

Kind = Literal["models", "datasets"]
Content = bytes | Path
Fault = Literal["wrong bytes", "cut", "status"]
Files = tuple[str, dict[str, Content]] | str  # a commit and its files, or the Hub's error code

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".model", ".h5", ".pt")
API = re.compile(r"/api/(models|datasets)/(.+?)/(revision|tree)/([^/]+)")
RESOLVE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")


@dataclass
class _Trouble:
    fault: Fault
    match: str
    times: int
    status: int


class Hub:
    """The server and what it serves.

    Attributes:
        requests: what was asked, as "GET /api/models/x".
        gated: repositories whose terms nobody accepted.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.closed = False
        # By kind and name: what a branch or a commit names, and the files of each commit.
        self._repositories: dict[tuple[str, str], dict[str, tuple[str, dict[str, Content]]]] = {}
        self._troubles: list[_Trouble] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        options = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a subprocess: the Hub is this server, every cache is under `home`."""
        return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(
        self, kind: Kind, repo_id: str, files: Mapping[str, Content] | Path, revision: str = "main"
    ) -> str:
        """Commit files (a mapping, or every file of a folder) to a branch; gives the commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p for p in sorted(files.rglob("*")) if p.is_file()}
        listing = [f"{name} {_digests(data)['blob']}" for name, data in sorted(files.items())]
        text = "\n".join([f"{kind}/{repo_id}/{revision}", *listing])
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        repository = self._repositories.setdefault((kind, repo_id), {})
        repository[commit] = repository[revision] = (commit, dict(files))
        return commit

    def misbehave(self, fault: Fault, match: str, times: int = 1, status: int = 500) -> None:
        """The next `times` requests whose "METHOD /path" contains `match` go wrong.

        "wrong bytes": the right number of bytes, each one flipped; "cut": half the body, then the
        connection closes; "status": this HTTP status.
        """
        self._troubles.append(_Trouble(fault, match, times, status))

    def trouble(self, request: str) -> _Trouble | None:
        """Note a request; what goes wrong with it."""
        with self._lock:
            self.requests.append(request)
            for trouble in self._troubles:
                if trouble.times > 0 and trouble.match in request:
                    trouble.times -= 1
                    return trouble
        return None

    def find(self, kind: str, repo_id: str, revision: str) -> Files:
        """The commit that a revision names and its files, or the Hub's error code."""
        if repo_id in self.gated:
            return "GatedRepo"
        repository = self._repositories.get((kind, repo_id))
        return (
            "RepoNotFound" if repository is None else repository.get(revision, "RevisionNotFound")
        )


def _read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _digests(content: Content) -> dict[str, Any]:
    data = _read(content)
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return {"size": len(data), "blob": blob, "sha256": hashlib.sha256(data).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        if self.hub.closed:  # a connection that was kept alive outlives the server
            self.close_connection = True
            return None
        path = urlsplit(self.path).path
        trouble = self.hub.trouble(f"{self.command} {unquote(path)}")
        if trouble is not None and trouble.fault == "status":
            return self.send(trouble.status, b"", {})
        if match := RESOLVE.fullmatch(path):
            datasets, repo_id, revision, name = match.groups()
            files = self.hub.find("datasets" if datasets else "models", repo_id, unquote(revision))
            return self.file(files, unquote(name), trouble)
        if match := API.fullmatch(path):
            kind, repo_id, what, revision = match.groups()
            return self.api(self.hub.find(kind, repo_id, unquote(revision)), repo_id, what)
        return self.send(404, b"", {})

    do_HEAD = do_GET = answer  # noqa: N815

    def api(self, commit_files: Files, repo_id: str, what: str) -> None:
        if isinstance(commit_files, str):
            return self.error(commit_files)
        commit, files = commit_files
        answer: Any = {"id": repo_id, "sha": commit, "private": False, "tags": []}
        answer["siblings"] = [{"rfilename": name} for name in files]
        if what == "tree":
            digests = {name: _digests(content) for name, content in files.items()}
            answer = [
                {"type": "file", "path": name, "oid": facts["blob"], "size": facts["size"]}
                for name, facts in digests.items()
            ]
        return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def file(self, commit_files: Files, path: str, trouble: _Trouble | None) -> None:
        if isinstance(commit_files, str):
            return self.error(commit_files)
        commit, files = commit_files
        if path not in files:
            return self.error("EntryNotFound", {"X-Repo-Commit": commit})
        data, facts = _read(files[path]), _digests(files[path])
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{facts["blob"]}"'
        if path.endswith(LFS_SUFFIXES):
            headers["X-Linked-Etag"] = f'"{facts["sha256"]}"'
            headers["X-Linked-Size"] = str(len(data))
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        return self.send(status, data, headers, trouble)

    def error(self, code: str, headers: dict[str, str] | None = None) -> None:
        status = {"GatedRepo": 403, "RepoNotFound": 401}.get(code, 404)
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def send(
        self,
        status: int,
        data: bytes,
        headers: Mapping[str, str],
        trouble: _Trouble | None = None,
    ) -> None:
        fault = trouble.fault if trouble else None
        if fault == "wrong bytes":
            data = bytes(255 - byte for byte in data)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)
