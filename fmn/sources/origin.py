"""A checkpoint from where it is (Hub, folder, MLflow registry, installed package), into a folder.

Sources are pinned and verified. Nothing that comes with one is ever executed: a pickle is loaded
by ``torch.load(weights_only=True)`` alone.
"""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module, metadata, util
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fmn.errors import UserError
from fmn.models import checkpoints, headers
from fmn.models.checkpoints import CONFIG, FISHER, GRAM, TOKENIZER_FILES, VOCABULARY_FILES
from fmn.models.headers import INDEX, PICKLED, WEIGHTS, names_in
from fmn.models.provenance import CheckpointInfo
from fmn.store import hub
from fmn.store.stage import Progress, no_progress

if TYPE_CHECKING:
    import torch

SCHEMES = ("hf://", "models:", "package:")  # how every source begins that is not a folder
# The only import upwards, and so by name: only the room `registry` knows MLflow. It is loaded for a
# registered model alone.
_REGISTRY = "fmn.registry.tracking"
_HUB = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)((?:/[\w.-]+)*)(?:@([\w.+/-]+))?")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)((?:/[^/@]+)*)/?(?:@([\w.+!-]+))?")


class Origin(NamedTuple):
    """Where the files of a checkpoint are.

    Attributes:
        source: what the user calls it.
        pinned: the source, such that it means the same bytes tomorrow.
        names: the files at its top level.
        local: gives the path on this machine of a file, which is downloaded if need be.
        open: opens a file to read parts of it; it is not downloaded for that.
        is_linked: whether copies of weights are links to these files.
    """

    source: str
    pinned: str
    names: frozenset[str]
    local: Callable[[str], Path]
    open: Callable[[str], BufferedReader]
    is_linked: bool = False


def pin(source: str) -> str:
    """A source such that the same string means the same bytes; raises as `copy_checkpoint` does.

    ``hf://org/name@<40 hex>``, ``models:/name/3``, ``package:module/path@<version>``; a folder
    stands for itself. A source that is pinned to a commit needs no network.
    """
    if source.startswith("models:"):
        return str(import_module(_REGISTRY).pin(source))
    if (match := _HUB.fullmatch(source)) and hub.COMMIT.fullmatch(match[3] or ""):
        return source
    return _origin(source).pinned


def folder_files(source: str) -> list[Path]:
    """The files that are taken from a folder; none for other sources, whose pin says enough."""
    if source.startswith(SCHEMES):
        return []
    origin = _origin(source)
    return [origin.local(name) for name in (*_small_files(origin), *weight_files(origin))]


def locate(source: str, scratch: Path, progress: Progress = no_progress) -> Origin:
    """Where the files of a source are; those of a registered model are put into `scratch`."""
    is_registered = source.startswith("models:")
    return _registered(source, scratch) if is_registered else _origin(source, progress)


def copy_checkpoint(
    source: str, folder: Path, progress: Progress = no_progress, *, statistics: bool = False
) -> CheckpointInfo:
    """Fill an empty folder with a whole, verified checkpoint from a source.

    Takes config.json, tokenizer files and safetensors weights; pickled weights only where there
    are no others, and then converts them. Names of old BERT files (``LayerNorm.gamma``) become
    runtime names.

    Args:
        source: ``hf://org/name@revision`` (without a revision: main; a folder of the repository as
            ``hf://org/name/tasks/x``), a folder,
            ``models:/name@alias``, ``models:/name/3`` or ``package:module/path``.
        folder: where to write; an empty folder.
        progress: called with (bytes, bytes in all) of the file that comes from the Hub.
        statistics: whether statistics that are published beside the checkpoint come along.

    Raises:
        UserError: the source does not exist, cannot be reached, is not what its digests say, or
            is no checkpoint that can be used without running code.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.source.") as scratch:
        return copy_files(locate(source, Path(scratch), progress), folder, statistics=statistics)


def copy_files(origin: Origin, folder: Path, *, statistics: bool) -> CheckpointInfo:
    """Fill an empty folder with the checkpoint in an origin; raises as `copy_checkpoint` does."""
    source = origin.source
    if not statistics:
        origin = origin._replace(names=origin.names - {FISHER, GRAM})
    try:
        _copy(origin, _small_files(origin), folder)
        checkpoints.load_config(folder)  # before weights are downloaded that cannot be used
        weights = weight_files(origin)
        _copy(origin, weights, folder)
        _rewrite(folder)
        config = checkpoints.load_config(folder)
        checkpoints.check_tensors(folder, config, head=False)
        if any((folder / name).is_file() for name in VOCABULARY_FILES):
            checkpoints.load_tokenizer(folder, config)
    except UserError as error:  # the reader does not know the folder that is being written
        raise UserError(str(error).replace(str(folder), source)) from error
    facts = {"model_type": config.model_type, "is_converted": weights == [PICKLED]}
    return CheckpointInfo(source=source, revision=origin.pinned, **facts)


def _copy(origin: Origin, names: Iterable[str], folder: Path) -> None:
    """Copy files; those of the Hub's cache become links to it, so that the disk has them once."""
    for name in names:
        path = origin.local(name).resolve()
        (folder / name).parent.mkdir(exist_ok=True)
        if origin.is_linked and name.endswith((".safetensors", ".bin")):
            with suppress(OSError):  # another file system, or one without links
                os.link(path, folder / name)
                continue
        shutil.copyfile(path, folder / name)


# ---------------------------------------------------------------------------------------------
# Where files are


def _origin(source: str, progress: Progress = no_progress) -> Origin:
    if match := _PACKAGE.fullmatch(source):
        return _package_origin(source, *match.groups())
    if (match := _HUB.fullmatch(source)) and ".." not in source:
        repo, inside = match[1], f"{match[2]}/".removeprefix("/")
        commit, files = hub.list_files(repo, match[3] or "main")
        names = frozenset(each.removeprefix(inside) for each in files if each.startswith(inside))
        return Origin(
            source,
            f"hf://{repo}{match[2]}@{commit}",
            names,
            local=lambda name: hub.download(repo, inside + name, commit, progress),
            open=lambda name: hub.open_file(repo, inside + name, commit),
            is_linked=True,
        )
    if source.startswith(SCHEMES):
        raise UserError(f"{source}: not a source; write hf://org/name or package:module/path")
    return _folder_origin(Path(source).expanduser(), source, source)


def _folder_origin(folder: Path, source: str, pinned: str) -> Origin:
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; of the Hub, write hf://org/name")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    names |= {name for name in (FISHER, GRAM) if (folder / name).is_file()}
    return Origin(
        source,
        pinned,
        frozenset(names),
        local=lambda name: folder / name,
        open=lambda name: (folder / name).open("rb"),
    )


def _registered(source: str, scratch: Path) -> Origin:
    """The one checkpoint in a registered model: of a model that fmn registered, the encoder."""
    pinned = str(import_module(_REGISTRY).download(source, scratch))
    configs = sorted(scratch.rglob(CONFIG))
    folders = [file.parent for file in configs if {WEIGHTS, INDEX, PICKLED} & names_in(file.parent)]
    if len(folders) != 1:
        names = ", ".join(str(path.relative_to(scratch)) for path in folders) or "none"
        raise UserError(f"{source}: not one checkpoint is in it but {names}; give a folder instead")
    return _folder_origin(folders[0], source, pinned)


def _package_origin(source: str, module: str, path: str, version: str | None) -> Origin:
    spec = util.find_spec(module)  # of a top-level package: this runs none of its code
    roots = list(spec.submodule_search_locations or []) if spec else []
    owner = (metadata.packages_distributions().get(module) or [module.replace("_", "-")])[0]
    installed = metadata.version(owner) if roots else None
    if installed is None or version not in (None, installed):
        remedy = f"pip install --no-deps {owner}" + (f"=={version}" if version else "")
        raise UserError(f"{source}: version {installed} is installed; `{remedy}`")
    return _folder_origin(Path(roots[0] + path), source, f"package:{module}{path}@{installed}")


# ---------------------------------------------------------------------------------------------
# Which files a checkpoint needs


def _small_files(origin: Origin) -> list[str]:
    """Every file that a checkpoint needs beside its weights, and statistics published with it."""
    if CONFIG not in origin.names:
        raise UserError(f"{origin.source}: {checkpoints.no_checkpoint(origin.names)}")
    return [name for name in (CONFIG, *TOKENIZER_FILES, FISHER, GRAM) if name in origin.names]


def weight_files(origin: Origin) -> list[str]:
    """The files of weights, and the index where they are shards; pickled only without others."""
    if WEIGHTS not in origin.names and INDEX in origin.names:
        shards = set(headers.weight_map(origin.local(INDEX)).values())
        if missing := shards - origin.names:
            raise UserError(f"{origin.source}: {INDEX} names {min(missing)}, which is not there")
        return [INDEX, *sorted(shards)]
    for name in (WEIGHTS, PICKLED):
        if name in origin.names:
            return [name]
    raise UserError(f"{origin.source}: {headers.no_weights(origin.names)}")


# ---------------------------------------------------------------------------------------------
# Weights as safetensors under runtime names


def runtime_name(name: str) -> str:
    """The name of a tensor today; old BERT files say ``LayerNorm.gamma`` and ``LayerNorm.beta``."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _rewrite(folder: Path) -> None:
    """Make safetensors of pickled weights, and runtime names of old names."""
    from safetensors.torch import load_file, save_file

    weights, pickled = folder / WEIGHTS, folder / PICKLED
    if pickled.is_file():
        tensors = _unpickle(pickled)
    elif weights.is_file() and any(runtime_name(n) != n for n in headers.file_headers(weights)):
        tensors = load_file(weights)
    else:
        return
    renamed = {runtime_name(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"{folder}: has a LayerNorm by its old and its new name; save it again")
    for path in (weights, pickled):  # a link to the Hub's cache is replaced, and not its file
        path.unlink(missing_ok=True)
    save_file(renamed, weights, metadata={"format": "pt"})


def _unpickle(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a pickled state dict, contiguous and sharing no memory."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not state or any(value.nbytes > path.stat().st_size for value in state.values()):
            raise ValueError("it is empty, or larger than the file")
        # Tied weights are written once for each name: which to drop is the model's business.
        return {str(name): value.detach().contiguous().clone() for name, value in state.items()}
    except Exception as error:  # a hostile pickle can raise anything
        problem = "is damaged, or holds more than tensors; ask its author for safetensors"
        raise UserError(f"{path}: {problem}") from error
