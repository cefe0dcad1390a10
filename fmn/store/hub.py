"""Requests to the Hugging Face Hub, with retries, checks of digests, and clear errors."""

import io
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fmn.errors import UserError
from fmn.store import artifacts
from fmn.store.stage import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")
COMMIT = re.compile(r"[0-9a-f]{40}")
RETRY_SECONDS = 30.0  # how long transient failures are retried
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_PROBLEMS = {  # by the name of huggingface_hub's exception
    "GatedRepoError": "it is gated; accept its terms on the Hub, then `hf auth login`",
    "RepositoryNotFoundError": "no such repository, or it is private; check it, or `hf auth login`",
    "RevisionNotFoundError": "no such revision; give a branch, a tag or a full commit",
    "HFValidationError": "not a name of the Hub; write hf://org/name@revision",
    "LocalEntryNotFoundError": "not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it",
}


def connect() -> "HfApi":
    """The Hub's interface, at the address in HF_ENDPOINT."""
    from huggingface_hub import HfApi, constants

    # Xet needs other hosts; plain HTTP works with every mirror.
    constants.HF_HUB_DISABLE_XET = True
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/"))


def list_files(
    repo: str, revision: str, kind: Literal["model", "dataset"] = "model"
) -> tuple[str, frozenset[str]]:
    """The commit of a revision, and the names of its files; offline, from the cache.

    Raises:
        UserError: the revision does not exist, or the Hub cannot be reached.
    """
    source, api = f"hf://{repo}@{revision}", connect()
    options: dict[str, Any] = {"revision": revision, "repo_type": kind}
    if not _is_offline():
        info: Any = _request(lambda: api.repo_info(repo, timeout=10, **options), source)
        return str(info.sha), frozenset(file.rfilename for file in info.siblings or ())
    options["local_files_only"] = True
    snapshot = Path(_request(lambda: api.snapshot_download(repo, **options), source))
    return snapshot.name, frozenset(artifacts.visible(snapshot))


def download(repo: str, name: str, commit: str, progress: Progress) -> Path:
    """Download a model's file to the cache, and check its digest; returns its path.

    Args:
        repo, name, commit: identify the file.
        progress: called with the bytes that are there, and all bytes of the file.

    Raises:
        UserError: the file does not exist, the Hub cannot be reached, or the digest differs.
    """
    source, api = f"hf://{repo}@{commit}", connect()
    options: dict[str, Any] = {"revision": commit, "tqdm_class": _meter(progress)}
    options["local_files_only"] = _is_offline()
    path = Path(_request(lambda: api.hf_hub_download(repo, name, **options), source))
    if not _is_intact(path):
        path.resolve().unlink()  # otherwise the cache returns it again
        problem = f"{name} is not what its digest says (damaged in the download or in the cache)"
        raise UserError(f"{source}: {problem}; run again to download it once more")
    return path


class RemoteFile(io.RawIOBase):
    """A file on the Hub that is read in parts, by HTTP range requests.

    Attributes:
        size: bytes of the whole file.

    Raises:
        UserError: the file does not exist, or the Hub cannot be reached.
    """

    def __init__(self, repo: str, name: str, commit: str, kind: str = "model") -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        endpoint, self.source = connect().endpoint, f"hf://{repo}@{commit}"
        self._url = hf_hub_url(repo, name, repo_type=kind, revision=commit, endpoint=endpoint)
        self.name, self._position = name, 0
        facts = _request(lambda: get_hf_file_metadata(self._url, timeout=10), self.source)
        self.size = int(facts.size or 0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self.size)
        if start >= end:
            return 0
        content = _request(lambda: self._bytes(start, end), self.source)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _bytes(self, start: int, end: int) -> bytes:
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        content = b""
        with get_session().stream("GET", self._url, headers=headers, timeout=10) as response:
            hf_raise_for_status(response)
            skipped = 0 if response.status_code == 206 else start  # a server without ranges
            for part in response.iter_bytes():
                content += part
                if len(content) >= skipped + end - start:
                    break
        return content[skipped : skipped + end - start]


def open_file(repo: str, name: str, commit: str, kind: str = "model") -> io.BufferedReader:
    """Open a file on the Hub to read parts of it: from the cache, or else as a `RemoteFile`."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, revision=commit, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached).open("rb")
    return io.BufferedReader(RemoteFile(repo, name, commit, kind), 1 << 16)


def upload(
    repo: str,
    files: Mapping[str, Path],
    *,
    branch: str,
    message: str,
    private: bool,
    is_stale: Callable[[str], bool],
    progress: Progress,
) -> tuple[str, str]:
    """Upload files to a model's repository in one commit; returns its address and the commit.

    A repository or branch that does not exist is created. Files whose bytes the Hub has already,
    under any name, are not sent again.

    Args:
        repo: the repository, ORG/NAME.
        files: the files by name in the repository.
        branch, message: of the commit.
        private: whether a new repository is private.
        is_stale: whether to remove a file of the repository that is not among `files`.
        progress: called with the bytes that are there, and all bytes.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    source, api = f"hf://{repo}@{branch}", connect()
    address = str(
        _request(lambda: api.create_repo(repo, private=private or None, exist_ok=True), source)
    )
    if branch != "main":
        _request(lambda: api.create_branch(repo, branch=branch, exist_ok=True), source)
    _, names = list_files(repo, branch)
    done, total = 0, sum(path.stat().st_size for path in files.values())
    additions = []
    with warnings.catch_warnings(action="ignore"):  # the library's, about its HTTP client
        for name, path in files.items():
            additions.append(CommitOperationAdd(name, path))
            # One at a time, so that equal files are sent only once.
            _request(partial(_send, api, repo, additions[-1], branch), source)
            done += path.stat().st_size
            progress(done, total)
        stale = [name for name in sorted(names - set(files)) if is_stale(name)]
        operations: list[Any] = [*additions, *map(CommitOperationDelete, stale)]
        commit = _request(
            lambda: api.create_commit(repo, operations, commit_message=message, revision=branch),
            source,
        )
    return address, str(commit.oid)


def _send(api: "HfApi", repo: str, addition: "CommitOperationAdd", branch: str) -> None:
    """Send the bytes of a large file before its commit."""
    try:
        api.preupload_lfs_files(repo, [addition], revision=branch)
    except RuntimeError as error:  # its cause is the error of the request
        raise error.__cause__ or error from None


def _is_intact(path: Path) -> bool:
    """Whether a file in the cache has the digest from the Hub, which is its name in the cache.

    For a large file (LFS) that is its sha256, for any other git's blob id (sha1).
    """
    from huggingface_hub.utils.sha import git_hash

    digest = path.resolve().name
    if len(digest) == 64:
        return artifacts.digest_file(path) == digest
    return bool(git_hash(path.read_bytes()) == digest)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _request(call: Callable[[], T], source: str) -> T:
    """Call a function, and retry transient failures with increasing waits.

    Raises:
        UserError: the request failed; `source` is the place in the message.
    """
    import httpx2  # the HTTP client of huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    deadline, wait = time.monotonic() + RETRY_SECONDS, 0.5
    while True:
        try:
            return call()
        except (httpx2.HTTPError, HFValidationError, OSError) as error:
            cause: BaseException = error
            if isinstance(error, LocalEntryNotFoundError) and not _is_offline():
                cause = error.__cause__ or error  # the error of the request
            if isinstance(cause, OSError) and cause.errno is not None:
                raise
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            # huggingface_hub raises a bare OSError for a file of the wrong length.
            is_transient = type(cause) is OSError or isinstance(cause, httpx2.TransportError)
            is_transient = is_transient or status in _TRANSIENT_STATUS
            if not is_transient or time.monotonic() + wait > deadline:
                raise UserError(f"{source:.120}: {_problem(cause, status)}") from error
        time.sleep(wait)
        wait = min(2 * wait, 8.0)


def _problem(error: BaseException, status: int | None) -> str:
    """Describe an error without the server's message and URL, which may contain a token."""
    name, offline = type(error).__name__, "set HF_HUB_OFFLINE=1 to use the cache"
    if name in _PROBLEMS:
        return _PROBLEMS[name]
    endpoint = connect().endpoint
    if status in (401, 403):
        return f"{endpoint} refuses the token; `hf auth login` or set HF_TOKEN"
    if status:
        return f"{endpoint} answers with status {status}; try again later, or {offline}"
    return f"cannot read from {endpoint} ({name}); check the network, or {offline}"


def _meter(progress: Progress) -> Any:
    """A class that replaces tqdm in huggingface_hub, and reports bytes to `progress`."""

    class Meter(nullcontext[Any]):
        def __init__(self, *, total: int | None = None, initial: int = 0, **_: object) -> None:
            super().__init__(self)
            self.done, self.total = initial, total or 0

        def update(self, count: float | None = 1) -> None:
            self.done += int(count or 0)
            progress(self.done, self.total)

    return Meter
