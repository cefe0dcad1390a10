"""A small Hub on loopback: what huggingface_hub needs to download and upload; it can misbehave.

    with Hub() as hub:
        commit = hub.add("models", "org/name", {"config.json": b"{}"})
        hub.misbehave("cut", "model.safetensors", times=1)
        subprocess.run([...], env=hub.environment(tmp_path / "home"))

Repositories live in memory: a commit maps paths to bytes (or to files on disk), a branch names a
commit.
"""

import base64
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

Content = bytes | Path
Fault = Literal["wrong bytes", "cut", "status"]
Commit = tuple[str, dict[str, Content]]  # its sha, and its files

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".model", ".h5", ".pt")
API = re.compile(r"/api/(models|datasets)/(.+?)/(revision|tree)/([^/]+)")
WRITE = re.compile(r"/api/models/(.+?)/(preupload|commit|branch)/([^/]+)")
LFS = re.compile(r"/(.+?)\.git/info/lfs/objects/batch")
RESOLVE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")


@dataclass
class _Trouble:
    fault: Fault
    match: str
    times: int
    status: int


class Hub(ThreadingHTTPServer):
    """The server and what it serves.

    Attributes:
        requests: what was asked, as "GET /api/models/x".
        sent: bytes of all answers.
        gated: repositories whose terms nobody accepted.
        private: repositories that were made as private ones.
        has_ranges: whether it heeds range requests.
        token: what a client that writes must send; None: nobody may write.
        uploads: the sha256 of every large file (LFS) that was sent, in order.
    """

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up; tests read what is printed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.sent = 0
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.has_ranges = True
        self.token: str | None = None
        self.objects: dict[str, bytes] = {}  # large files that were sent, by sha256
        self.uploads: list[str] = []
        self.is_closed = False
        # By kind and name: what a branch or a commit names.
        self.repositories: dict[tuple[str, str], dict[str, Commit]] = {}
        self.troubles: list[_Trouble] = []
        options = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self.serve_forever, kwargs=options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True
        self.shutdown()
        self._thread.join()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a subprocess: the Hub is this server, every cache is under `home`."""
        others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**others, **quiet, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def add(
        self, kind: str, repo_id: str, files: Mapping[str, Content] | Path, revision: str = "main"
    ) -> str:
        """Commit files (a mapping, or every file of a folder) to a branch; returns the commit.

        The kind is "models" or "datasets".
        """
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p for p in sorted(files.rglob("*")) if p.is_file()}
        digests = [f"{name} {_blob(_read(content))}" for name, content in sorted(files.items())]
        commit = _sha1("\n".join([kind, repo_id, revision, *digests]).encode())
        repository = self.repositories.setdefault((kind, repo_id), {})
        repository[commit] = repository[revision] = (commit, dict(files))
        return commit

    def misbehave(self, fault: Fault, match: str, times: int = 1, status: int = 500) -> None:
        """The next `times` requests whose "METHOD /path" contains `match` go wrong.

        "wrong bytes": the right number of bytes, each one flipped; "cut": half the body, then the
        connection closes; "status": this HTTP status.
        """
        self.troubles.append(_Trouble(fault, match, times, status))

    def trouble(self, request: str) -> _Trouble | None:
        """Note a request; returns what goes wrong with it."""
        self.requests.append(request)
        for trouble in self.troubles:
            if trouble.times > 0 and trouble.match in request:
                trouble.times -= 1
                return trouble
        return None


def _read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _blob(data: bytes) -> str:
    """The id that git gives a file."""
    return _sha1(b"blob %d\0" % len(data) + data)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        if self.server.is_closed:  # a connection that was kept alive outlives the server
            self.close_connection = True
            return
        path = urlsplit(self.path).path
        trouble = self.server.trouble(f"{self.command} {unquote(path)}")
        if trouble is not None and trouble.fault == "status":
            self.send(trouble.status, b"", {})
        elif match := RESOLVE.fullmatch(path):
            datasets, repo_id, revision, name = match.groups()
            if commit := self.commit("datasets" if datasets else "models", repo_id, revision):
                self.file(*commit, unquote(name), trouble)
        elif match := API.fullmatch(path):
            kind, repo_id, what, revision = match.groups()
            if commit := self.commit(kind, repo_id, revision):
                self.api(*commit, repo_id, what)
        else:
            self.send(404, b"", {})

    do_HEAD = do_GET = answer  # noqa: N815

    def write(self) -> None:
        """Answer what puts files into a model's repository."""
        path, body = urlsplit(self.path).path, self.body()
        trouble = self.server.trouble(f"{self.command} {unquote(path)}")
        is_allowed = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if trouble is not None and trouble.fault == "status":
            self.send(trouble.status, b"", {})
        elif path.startswith("/lfs/"):  # with an address that was given to who may
            oid = hashlib.sha256(body).hexdigest()
            self.server.objects[oid] = body
            self.server.uploads.append(oid)
            self.send(200 if path == f"/lfs/{oid}" else 400, b"", {})
        elif not is_allowed:
            self.error(401 if "Authorization" not in self.headers else 403, "")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif match := LFS.fullmatch(path):
            self.json({"transfer": "basic", "objects": self.batch(json.loads(body)["objects"])})
        elif match := WRITE.fullmatch(path):
            repo_id, what, branch = match[1], match[2], unquote(match[3])
            repository = self.server.repositories.get(("models", repo_id))
            if repository is None:
                self.error(404, "RepoNotFound")
            elif what == "branch":
                is_there = branch in repository
                repository.setdefault(branch, repository["main"])
                self.send(409 if is_there else 201, b"{}", {})
            elif branch not in repository:
                self.error(404, "RevisionNotFound")
            elif what == "preupload":
                files = [
                    {
                        "path": file["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    }
                    for file in json.loads(body)["files"]
                ]
                self.json({"files": files})
            else:
                self.add(repo_id, branch, body)
        else:
            self.send(404, b"", {})

    do_POST = do_PUT = write  # noqa: N815

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):  # in chunks
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def create(self, wanted: Mapping[str, Any]) -> None:
        repo_id = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        is_there = ("models", repo_id) in self.server.repositories
        if not is_there:
            self.server.add("models", repo_id, {".gitattributes": b""})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo_id)
        answer = json.dumps({"url": f"{self.server.url}/{repo_id}"}).encode()
        self.send(409 if is_there else 200, answer, {})

    def batch(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What to do with each large file: nothing if its bytes are here."""
        return [
            {
                "oid": each["oid"],
                "size": each["size"],
                **(
                    {}
                    if each["oid"] in self.server.objects
                    else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                ),
            }
            for each in objects
        ]

    def add(self, repo_id: str, branch: str, body: bytes) -> None:
        """Make the commit that lines of JSON describe."""
        repository = self.server.repositories["models", repo_id]
        files = dict(repository[branch][1])
        for line in body.splitlines():
            operation, value = (each for _, each in sorted(json.loads(line).items()))
            if operation == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation == "deletedFile":
                del files[value["path"]]
        commit = self.server.add("models", repo_id, files, branch)
        answer = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit}
        self.json(answer)

    def json(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def commit(self, kind: str, repo_id: str, revision: str) -> Commit | None:
        """The commit that a revision names; where there is none, the Hub's error is sent."""
        repository = self.server.repositories.get((kind, repo_id))
        if repo_id in self.server.gated:
            self.error(403, "GatedRepo")
        elif repository is None:
            self.error(401, "RepoNotFound")
        elif unquote(revision) not in repository:
            self.error(404, "RevisionNotFound")
        else:
            return repository[unquote(revision)]
        return None

    def api(self, commit: str, files: dict[str, Content], repo_id: str, what: str) -> None:
        answer: Any = {"id": repo_id, "sha": commit, "private": False, "tags": []}
        answer["siblings"] = [{"rfilename": name} for name in files]
        if what == "tree":
            read = {name: _read(content) for name, content in files.items()}
            answer = [
                {"type": "file", "path": name, "oid": _blob(data), "size": len(data)}
                for name, data in read.items()
            ]
        self.json(answer)

    def file(
        self, commit: str, files: dict[str, Content], path: str, trouble: _Trouble | None
    ) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            self.error(404, "EntryNotFound", headers)
            return
        data, status = _read(files[path]), 200
        headers["ETag"] = f'"{_blob(data)}"'
        if path.endswith(LFS_SUFFIXES):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.has_ranges:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        self.send(status, data, headers, trouble.fault if trouble else None)

    def error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def send(
        self, status: int, data: bytes, headers: Mapping[str, str], fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "wrong bytes":
            data = bytes(255 - byte for byte in data)
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.server.sent += len(data)
            self.wfile.write(data)
