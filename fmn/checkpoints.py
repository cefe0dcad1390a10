"""A source (Hub, folder, MLflow registry, installed package) to a pinned, verified local checkpoint, and its loading.

A checkpoint is a folder with config.json, tokenizer files and safetensors weights under runtime names. Nothing in it is
ever executed: no pickle is loaded outside ``torch.load(weights_only=True)``, ``trust_remote_code`` is never true.

The safetensors format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, a JSON
header of that length, then the tensors' bytes without gaps).
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fmn import artifacts, tasks
from fmn.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
T = TypeVar("T")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Files that hold a vocabulary; the others only describe how to use it.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
)
# Bytes of an element, by the format's names. Types below a byte are left out: nothing here can merge them.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
PATIENCE = 30.0
_LARGEST_HEADER = 100_000_000  # the format's own bound
_LARGEST_JSON = 64_000_000
_SUMMARY = 160  # characters of another library's error that fit into one line of ours
_CHUNK = 1 << 20


class TensorHeader(NamedTuple):
    """Where a tensor lies: its bytes are ``file[start:end]``, row-major, of a safetensors dtype such as "F32"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Names(NamedTuple):
    """The stored name of every encoder tensor by its name in the base model, and of every head tensor by its name in
    AutoModelForSequenceClassification."""

    encoder: dict[str, str]
    head: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


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
_PACKAGE = re.compile(r"package:(?P<module>[A-Za-z_]\w*)(?P<path>(?:/[^/@]+)*)/?(?:@(?P<version>[\w.+!-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def resolve(source: str, *, patience: float = PATIENCE) -> str:
    """Pin a source, so that the same string means the same bytes.

    ``hf://org/name@<40 hex>``, ``models:/name/3``, ``package:module/path@<version>``; a folder stands for itself (its
    content is what its files' digests say). A pinned Hub source needs no network. UserError as for `fetch`.
    """
    if source.startswith("models:"):
        from fmn import registry

        return str(registry.pin(source))
    if (hub := _HUB.fullmatch(source)) and _COMMIT.fullmatch(hub["revision"] or ""):
        return source
    return _origin(source, patience, None).revision


def fetch(source: str, out: Path, *, patience: float = PATIENCE, progress: Progress | None = None) -> dict[str, Any]:
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
    if not source.startswith(("hf://", "models:", "package:")):
        place = Path(source).expanduser().resolve()
        if place.is_relative_to(out.resolve()):
            raise UserError(f"{source}: lies in the folder to be written, {out}; choose another one for --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.source.") as scratch,
        artifacts.whole_folder(out) as folder,
    ):
        if source.startswith("models:"):
            from fmn import registry

            revision = str(registry.download(source, Path(scratch)))
            origin = replace(_folder_origin(_only_checkpoint(Path(scratch), source), source), revision=revision)
        else:
            origin = _origin(source, patience, progress)
        try:
            pickled = _take_checkpoint(origin, folder, source)
            for path in _weight_files(folder):
                _use_runtime_names(path)
            config = load_config(folder)
            _check_tensors(folder, config, head=False)
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
            raise UserError(f"{source}: '..' is part of no repository or revision; write hf://org/name@revision")
        return _hub_origin(hub["repo"], hub["revision"] or "main", patience, progress)
    if package := _PACKAGE.fullmatch(source):
        return _package_origin(source, package["module"], package["path"], package["version"])
    if source.startswith(("hf:", "package:")):
        raise UserError(f"{source}: not a source; write hf://org/name@revision or package:module/path")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        hint = f"; for the Hub write hf://{source}" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else ""
        raise UserError(f"{source}: no such folder{hint}")
    return _folder_origin(folder, source)


def _folder_origin(folder: Path, source: str) -> _Origin:
    root = folder.resolve()

    def get(name: str, again: bool) -> Path:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise UserError(f"{source}: {name} is a link that leads out of the folder; copy it with `cp -rL` first")
        if not path.is_file():
            raise UserError(f"{source}: {name} is not a regular file")
        return path

    return _Origin(source, {path.name: _File(path.lstat().st_size, None) for path in root.iterdir()}, get)


def _only_checkpoint(folder: Path, source: str) -> Path:
    """The one checkpoint in a registered model: of a model that fmn registered, the merged encoder."""
    weights = (WEIGHTS, INDEX, *PICKLED)
    found = sorted(
        path.parent for path in folder.rglob(CONFIG) if any((path.parent / name).exists() for name in weights)
    )
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise UserError(f"{source}: holds not one checkpoint but {names}; register one, or give its folder instead")
    return found[0]


def _package_origin(source: str, module: str, path: str, version: str | None) -> _Origin:
    spec = importlib.util.find_spec(module)  # of a top-level package: finds it, runs none of its code
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    distribution = module.replace("_", "-")
    if not roots:
        wanted = f"{distribution}=={version}" if version else distribution
        raise UserError(f"{source}: the package {module} is not installed; `pip install --no-deps {wanted}`")
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


def _hub_origin(repo: str, revision: str, patience: float, progress: Progress | None) -> _Origin:
    # Xet would fetch from hosts of its own; plain HTTP works with every mirror. Read when the library is imported.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    source = f"hf://{repo}@{revision}"
    endpoint = os.environ.get("HF_ENDPOINT", huggingface_hub.constants.ENDPOINT).rstrip("/")
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        info = _patiently(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=10), source, endpoint, patience
        )
    except OfflineModeIsEnabled:
        return _cached_origin(repo, revision, source)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise UserError(f"{source}: {_host(endpoint)} names no commit for it; check HF_ENDPOINT")
    commit = str(info.sha)
    files = {
        one.rfilename: _File(one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id) for one in info.siblings or ()
    }
    meter = _meter(progress)

    def get(name: str, again: bool) -> Path:
        def download() -> str:
            return huggingface_hub.hf_hub_download(
                repo, name, revision=commit, endpoint=endpoint, force_download=again, tqdm_class=meter
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

    files = {path.name: _File(path.stat().st_size, digest(path)) for path in snapshot.iterdir() if path.is_file()}
    return _Origin(f"hf://{repo}@{snapshot.name}", files, lambda name, again: snapshot / name)


def _patiently(call: Callable[[], T], source: str, endpoint: str, patience: float) -> T:
    """Call; try again with longer and longer waits, at most ``patience`` seconds in all, while the fault may pass.

    Offline mode is passed on; every other fault of the Hub becomes a UserError.
    """
    import httpx2  # the HTTP client of huggingface_hub, for its exceptions
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    deadline, wait = time.monotonic() + patience, 0.5
    while True:
        try:
            with _quiet("huggingface_hub"):
                return call()
        except OfflineModeIsEnabled:
            raise
        except (httpx2.HTTPError, HfHubHTTPError, OSError) as error:
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if isinstance(cause, HfHubHTTPError):
                passing = cause.response.status_code in (408, 429, 500, 502, 503, 504)
            else:  # an OSError without a number is huggingface_hub's own: a body of the wrong length
                passing = isinstance(cause, httpx2.TransportError) or (type(cause) is OSError and cause.errno is None)
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
        return f"{source}: the repository has no such revision; give a branch, a tag or a full commit"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{source}: {host} refuses the token; `hf auth login` or set HF_TOKEN"
        return (
            f"{source}: {host} answers with status {status}; try again later, or set HF_HUB_OFFLINE=1 to use the cache"
        )
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
    names = set(origin.files)
    if CONFIG not in names:
        raise UserError(f"{source}: {_no_checkpoint(names)}")
    for name in (CONFIG, *TOKENIZER_FILES):
        if name in names:
            _take(origin, name, folder, source)
    _read_config(folder)  # refuse what cannot be used before its weights are downloaded
    single, index = (WEIGHTS, INDEX) if names & {WEIGHTS, INDEX} else PICKLED
    if single in names:
        weights = [single]
    elif index in names:
        _take(origin, index, folder, source)
        weights = sorted(set(_weight_map(folder / index).values()))
        if absent := [name for name in weights if name not in names]:
            raise UserError(f"{source}: {index} names {absent[0]}, which is not there; get the checkpoint again")
    else:
        raise UserError(f"{source}: {_no_weights(names)}")
    for name in weights:
        _take(origin, name, folder, source)
    if single == WEIGHTS:
        return []
    _convert(folder, weights)
    (folder / index).unlink(missing_ok=True)
    return weights


def _no_checkpoint(names: Iterable[str]) -> str:
    if "adapter_config.json" in names:
        return "holds a PEFT adapter alone; merge it into its base (`merge_and_unload`), save that, and give its folder"
    if "merge.json" in names:
        return "is a merged model; give one of its folders: encoder, or tasks/TASK"
    return f"has no {CONFIG}; give the folder or repository of a Transformers checkpoint"


def _no_weights(names: Iterable[str]) -> str:
    if "adapter_config.json" in names:
        return _no_checkpoint(names)
    other = sorted(
        name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt", ".pt"))
    )
    found = f" (only {other[0]}, which cannot be used)" if other else ""
    return f"has neither {WEIGHTS} nor {PICKLED[0]}{found}; save it with `save_pretrained`"


def _take(origin: _Origin, name: str, folder: Path, source: str) -> None:
    """Copy one file, checking the copied bytes against the digest that the source states."""
    expected = origin.files[name].digest
    for again in (False, True):
        path = origin.get(name, again)
        digest = hashlib.sha256() if expected is None or len(expected) == 64 else _git_blob(path.stat().st_size)
        with path.open("rb") as file, (folder / name).open("wb") as copy:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
        if expected in (None, digest.hexdigest()):
            return
    raise UserError(
        f"{source}: {name} is not what its digest says; damaged on its way, or in the cache ({path}); try again later"
        " with the network"
    )


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
            WEIGHTS if len(names) == 1 else f"{name.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"
        )
        tensors = _unpickle(path)
        if twice := sorted(set(tensors) & set(where)):
            raise UserError(f"{path}: holds {twice[0]}, as {where[twice[0]]} does; save the checkpoint again")
        save_file(tensors, folder / target, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, target)
        path.unlink()
    if len(names) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1) + "\n")


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
        raise UserError(refusal) from error
    if not isinstance(state, Mapping) or not state:
        raise UserError(refusal)
    tensors: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, value in state.items():
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not isinstance(name, str) or not plain or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{path}: {name!r:.80} is not a plain tensor; save the model's state_dict alone")
        if value.nbytes > size:  # strides of zero make a small storage look huge
            raise UserError(f"{path}: {name!r:.80} is larger than the file; refused")
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    return tensors


def _use_runtime_names(path: Path) -> None:
    """Rename what old BERT files call ``LayerNorm.gamma`` and ``LayerNorm.beta``, leaving the tensors' bytes alone."""
    stored = _file_headers(path)
    names = {name: _runtime_name(name) for name in stored}
    if all(name == runtime for name, runtime in names.items()):
        return
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: holds a LayerNorm under its old and its new name; save the checkpoint again")
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
        content = _read_json(index)
        content["weight_map"] = {_runtime_name(name): shard for name, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=1) + "\n")


def _runtime_name(name: str) -> str:
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder by its stored name, read from the headers alone and validated.

    UserError naming the file and tensor where a header, or the index over the shards, is not consistent with the files.
    """
    files = _weight_files(folder)
    if files == [folder / WEIGHTS]:
        return _file_headers(folder / WEIGHTS)
    stated = _weight_map(folder / INDEX)
    headers: dict[str, TensorHeader] = {}
    for path in files:
        for name, header in _file_headers(path).items():
            if name in headers:
                raise UserError(f"{path}: {name!r:.80} is in {headers[name].file.name} too; save the checkpoint again")
            if stated.get(name) != path.name:
                raise UserError(f"{folder / INDEX}: does not say that {name!r:.80} is in {path.name}; save it again")
            headers[name] = header
    if absent := sorted(set(stated) - set(headers)):
        raise UserError(f"{folder / INDEX}: {absent[0]!r:.80} is not in {stated[absent[0]]}; get the checkpoint again")
    return headers


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = {path.name for path in folder.iterdir()}
    if WEIGHTS in names:
        return [folder / WEIGHTS]
    if INDEX not in names:
        remedy = "; `fmn fetch` converts them" if any(name.startswith("pytorch_model") for name in names) else ""
        raise UserError(
            f"{folder}: has no safetensors weights{remedy}" if remedy else f"{folder}: {_no_weights(names)}"
        )
    return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor, from an index; shards are plain names beside it."""
    stated = _read_json(index).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise UserError(f"{index}: has no weight_map; get the checkpoint again")
    suffix = ".bin" if ".bin." in index.name else ".safetensors"
    for tensor, shard in stated.items():
        if not (isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*", shard) and shard.endswith(suffix)):
            raise UserError(
                f"{index}: {tensor!r:.80} is said to be in {shard!r:.80}, which is no name of a {suffix} file"
            )
    return stated


def _file_headers(path: Path) -> dict[str, TensorHeader]:
    def wrong(what: str) -> UserError:
        return UserError(f"{path}: not a valid safetensors file: {what}; get it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise wrong(f"its header cannot be {length} bytes long" if length >= 0 else "it is cut off")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); get it again") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON that can be used ({error!s:.80})") from error
    if not isinstance(header, dict):
        raise wrong("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("its __metadata__ does not map text to text")

    begin = 8 + length
    headers = {}
    for name, entry in header.items():
        if not name.isprintable():
            raise wrong(f"the name {name!r:.80} is not printable")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise wrong(f"{name!r:.80} does not state dtype, shape and data_offsets alone")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise wrong(f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise wrong(f"{name!r:.80} has a shape or data_offsets that are not whole numbers from 0 on")
        start, end = offsets
        if end - start != math.prod(shape) * ITEM_SIZES[dtype]:
            raise wrong(f"{name!r:.80} of shape {shape!s:.80} and dtype {dtype} cannot have {end - start} bytes")
        headers[name] = TensorHeader(path, dtype, tuple(shape), begin + start, begin + end)
    position = begin
    for name, one in sorted(headers.items(), key=lambda item: (item[1].start, item[1].end)):
        if one.start != position:
            fault = "overlaps the tensor before it" if one.start < position else "leaves a gap before it"
            raise wrong(f"{name!r:.80} {fault}")
        position = one.end
    if position != size:
        raise wrong(f"its tensors end at byte {position}, the file at {size}")
    return headers


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path}: larger than {_LARGEST_JSON // 10**6} MB; not a file of its kind")
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be used ({error!s:.80}); get the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and names

_MOST_LAYERS = 1000
_MOST_LABELS = 100_000
_LARGEST_SIZE = 2**31
# Sizes as every configuration answers to them, whatever it calls them in its file.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands, refused where even reading it with Transformers could run code or take all memory."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if CONFIG not in names:
        raise UserError(f"{folder}: {_no_checkpoint(names)}" if folder.is_dir() else f"{folder}: no such folder")
    if "adapter_config.json" in names:  # Transformers would apply it to the weights
        raise UserError(
            f"{folder}: holds a PEFT adapter beside a model; keep only one of them, `fmn fetch` copies the model"
        )
    raw = _read_json(folder / CONFIG)

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        if "auto_map" in raw:
            raise UserError(
                f"{folder}: {CONFIG} points to code of its own (auto_map), which is never run;"
                " choose an architecture that Transformers knows"
            )
        named = (
            f"names the model_type {model_type!r:.40}, unknown to Transformers" if model_type else "has no model_type"
        )
        raise UserError(f"{folder}: {CONFIG} {named}; set it, for example to bert")
    if "quantization_config" in raw:
        raise UserError(
            f"{folder}: the weights are quantized (quantization_config); use a checkpoint in full precision"
        )
    for key, value in _items(raw):
        if "_implementation" in key and isinstance(value, str) and re.search(r"[^\w]", value):
            raise UserError(f"{folder}: {CONFIG} asks for code from elsewhere ({key}: {value:.80}), which is never run")
        if isinstance(value, int) and not isinstance(value, bool):
            most = _MOST_LAYERS if re.search(r"layers?$|blocks$|groups?$|inner_group_num$", key) else _LARGEST_SIZE
            most = _MOST_LABELS if key.endswith("num_labels") else most
            if abs(value) > most:
                raise UserError(f"{folder}: {CONFIG} has {key} = {value!s:.40}, beyond anything real ({most})")
    return raw


def _items(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a JSON value, with the keys that lead to it, joined by dots."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _items(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list):
        for value in content:
            yield from _items(value, path)
    else:
        yield path, content


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library's warnings from the terminal."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the progress bars of Transformers from the terminal."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _summary(error: BaseException) -> str:
    return " ".join(str(error).split())[:_SUMMARY] or type(error).__name__


def load_config(folder: Path) -> "PretrainedConfig":
    """The configuration in a checkpoint folder; UserError where it is absurd or needs code of its own."""
    _read_config(folder)
    from transformers import AutoConfig

    try:
        with _quiet("transformers"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration validates itself in its own way
        raise UserError(f"{folder / CONFIG}: cannot be used: {_summary(error)}") from error
    for name in _SIZES:
        value = getattr(config, name, None)
        # Some architectures have no segments, and say so with a size of zero.
        least = 0 if name == "type_vocab_size" else 1
        if isinstance(value, int) and value < least:
            raise UserError(f"{folder / CONFIG}: {name} is {value}; it must be at least {least}")
    return config


def _skeleton(
    config: "PretrainedConfig", where: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], str]:
    """Shapes of the encoder (base model names) and of the head of the classifier that a configuration describes, and
    the prefix that the encoder has in it. Built without memory for weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with _quiet("transformers"), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture refuses sizes in its own way
        raise UserError(
            f"{where}: {CONFIG} describes no text classifier that can be built: {_summary(error)}"
        ) from error
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    encoder = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    return encoder, {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}, prefix


def encoder_names(config: "PretrainedConfig", names: Iterable[str]) -> Names:
    """Split a checkpoint's stored names into encoder and head, whether or not they carry the base model's prefix.

    Buffers and the heads of pretraining (``cls.*``, ``lm_head.*``) are in neither, nor is a pooler that the classifier
    does not use. UserError for a tensor that is there with and without the prefix.
    """
    return _split(*_skeleton(config, config.model_type), names)


def _split(encoder: Iterable[str], head: Iterable[str], prefix: str, names: Iterable[str]) -> Names:
    known, heads = set(encoder), set(head)
    split = Names({}, {})
    for stored in names:
        name = stored.removeprefix(prefix)
        if name in known or stored in known:
            name = name if name in known else stored
            if name in split.encoder:
                raise UserError(f"the checkpoint holds {split.encoder[name]} and {stored}, which are the same tensor")
            split.encoder[name] = stored
        elif stored in heads:
            split.head[stored] = stored
    return split


def _check_tensors(folder: Path, config: "PretrainedConfig", *, head: bool) -> tuple[Names, dict[str, TensorHeader]]:
    """Compare the tensors of a folder with the model that its configuration describes; ``head``: it must have one."""
    headers = tensor_headers(folder)
    encoder, heads, prefix = _skeleton(config, str(folder))
    try:
        names = _split(encoder, heads, prefix, headers)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    for name, stored in (names.encoder | (names.head if head else {})).items():
        shape, stated = headers[stored].shape, (encoder | heads)[name]
        if shape != stated:
            raise UserError(
                f"{folder}: {stored} has shape {shape}, but {CONFIG} makes it {stated}; one of them is wrong"
            )
    used = {*names.encoder.values(), *names.head.values()}
    families = {_family(name) for name in encoder}
    for stored in headers:
        if (
            stored not in used
            and stored.removeprefix(prefix) not in encoder
            and _family(stored.removeprefix(prefix)) in families
        ):
            raise UserError(f"{folder}: has {stored}, but {CONFIG} describes fewer layers; one of them is wrong")
    # A classifier may make a pooler of its own when it is fine-tuned, as it makes a head.
    absent = [name for name in encoder if name not in names.encoder and (head or not name.startswith("pooler."))]
    if absent:
        raise UserError(f"{folder}: has no {absent[0]}, but {CONFIG} describes it; one of them is wrong")
    if head and (absent := [name for name in heads if name not in names.head]):
        raise UserError(f"{folder}: has no classification head ({absent[0]}); fine-tune it first, `fmn finetune`")
    return names, headers


def _family(name: str) -> str:
    """A tensor's name with its layer numbers left out."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "#", name)


# ---------------------------------------------------------------------------------------------------------------------
# Checking experts against each other


def check_experts(experts: Mapping[str, Path], base: Path | None = None) -> None:
    """Refuse experts that cannot be merged, before anything expensive is done, from headers and small files alone.

    All must have the architecture, sizes, encoder tensors and vocabulary of the base (or of the first expert), and each
    a head that fits its task. UserError with one line that names the task, the folder and what differs.

    Args:
        experts: checkpoint folders by task name.
        base: the folder that they were fine-tuned from, where it is known.
    """
    folders = {"the base": base} if base is not None else {}
    folders |= {tasks.task(name).name: path for name, path in experts.items()}
    if not experts:
        raise UserError("no experts were given; name at least one, TASK=DIR")
    first: _Candidate | None = None
    for who, folder in folders.items():
        try:
            config = load_config(folder)
            names, headers = _check_tensors(folder, config, head=who in tasks.TASKS)
            vocabulary = load_tokenizer(folder).get_vocab()
        except UserError as error:
            raise UserError(f"{who}: {error}") from error
        if who in tasks.TASKS:
            task = tasks.task(who)
            if config.num_labels != task.num_outputs:
                raise UserError(
                    f"{who}: {folder} has a head of {config.num_labels} outputs, the task needs {task.num_outputs};"
                    " give an expert of this task"
                )
        if max(vocabulary.values(), default=-1) >= config.vocab_size:
            raise UserError(
                f"{who}: {folder}: the tokenizer has token ids up to {max(vocabulary.values())}, the model only"
                f" {config.vocab_size} embeddings; take the tokenizer files of the model's own checkpoint"
            )
        shapes = {name: headers[stored].shape for name, stored in names.encoder.items()}
        candidate = _Candidate(who, folder, config, shapes, vocabulary)
        first = first or candidate
        if difference := _difference(candidate, first):
            raise UserError(
                f"{who}: {folder} and {first.who} ({first.folder}) were not fine-tuned from one base: {difference};"
                " choose experts of the same base model"
            )


class _Candidate(NamedTuple):
    who: str
    folder: Path
    config: Any
    shapes: dict[str, tuple[int, ...]]
    vocabulary: dict[str, int]


def _difference(one: _Candidate, other: _Candidate) -> str | None:
    """What keeps two checkpoints from being merged, in words, or None."""
    for name in ("model_type", *(size for size in _SIZES if size != "num_labels"), "hidden_act"):
        values = [getattr(candidate.config, name, None) for candidate in (one, other)]
        if values[0] != values[1]:
            return f"{name} is {values[0]}, not {values[1]}"
    for name in sorted({*one.shapes, *other.shapes}):
        shapes = [candidate.shapes.get(name, "absent") for candidate in (one, other)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]}, not {shapes[1]}"
    if one.vocabulary != other.vocabulary:
        token = min(token for token, _ in one.vocabulary.items() ^ other.vocabulary.items())
        places = [candidate.vocabulary.get(token, "absent") for candidate in (one, other)]
        return f"the token {token!r:.40} is {places[0]} in the vocabulary, not {places[1]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a checkpoint folder. One without a padding token pads with its end of text."""
    from transformers import AutoTokenizer

    _read_config(folder)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{folder}: has no tokenizer files; copy those of its base model into it")
    try:
        with _quiet("transformers"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries below raise what they like on a broken file
        raise UserError(f"{folder}: its tokenizer files cannot be used: {_summary(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{folder}: its tokenizer has neither a padding nor an end token; set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(folder: Path) -> "PreTrainedModel":
    """The classifier in a checkpoint folder (or a task's folder in a merged model), in float32 and evaluation mode.

    Every weight comes from the folder: one that the model needs and the folder lacks is a UserError.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = load_config(folder)
    _check_tensors(folder, config, head=True)
    if config.pad_token_id is None:  # a batch of unequal lengths needs one to find where each text ends
        config.pad_token_id = load_tokenizer(folder).pad_token_id
    try:
        with _quiet("transformers"), _no_bars():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded: {_summary(error)}") from error
    return model.eval()
