"""Where a task's data set lies: its files by split, here, at a URL, or on the Hub.

Nothing that comes with a data set is executed, and nothing is cached but what the Hub gives.
"""

import glob
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError, hint
from fmn.store import artifacts
from fmn.tasks.task import DatasetSettings, TaskSettings

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMATS: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz")
OTHER_JSON = ("task.json", "fmn.json", "dataset_infos.json")  # beside rows, and no rows themselves
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes: several splits, or one
VALIDATION = ("validation", "valid", "dev", "val", "eval", "test")  # the first that there is
_HUB_NAME = re.compile(r"(?:hf://)?(?:datasets/)?([\w.-]+(?:/[\w.-]+)?)")
_NAME = re.compile(r"[\w. -]+")  # of a split, and of its file
_SHARD = re.compile(r"-\d+(-of-\d+)?$")


class File(NamedTuple):
    """A file or folder of rows. `name` is what messages call it."""

    name: str
    path: str
    system: "AbstractFileSystem"
    format: str  # csv, tsv, json, parquet; or saved, a folder of `save_to_disk`
    classes: Mapping[str, Sequence[str]] = MappingProxyType({})  # names by column, of a data card

    @property
    def local(self) -> Path | None:
        """The path on this machine; None of a file elsewhere."""
        return Path(self.path) if "file" in self.system.protocol else None

    def digest(self) -> Path | str:
        """What the stage's key has of it: the local path, or the digest of what lies elsewhere."""
        if path := self.local:
            return path
        with reachable(self.name):
            parts = sorted(self.system.find(self.path))
            digests = [artifacts.digest_bytes(self.system.cat_file(part)) for part in parts]
        return artifacts.digest_bytes("".join(digests).encode())


Splits = Mapping[str, Sequence[File]]


@contextmanager
def reachable(name: str) -> Iterator[None]:
    """Explain what goes wrong while rows at a URL are looked for or read, whoever serves them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "://" not in name or name.startswith("file://"):
            raise
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"{name}: cannot be read ({reason:.160}); check the address, network and credentials"
        ) from error


def local_files(definition: TaskSettings) -> list[Path]:
    """Every file on this machine that a definition reads, in the order in which it is read.

    Raises:
        UserError: the definition names a file or folder that does not exist.
    """
    dataset = definition.dataset
    if dataset is None or hub_name(dataset):
        return []
    files = [file for files in find_files(dataset).values() for file in files if file.local]
    paths = [Path(file.path if "://" in file.name else file.name) for file in files]
    return [
        file
        for path in paths
        for file in (artifacts.visible(path).values() if path.is_dir() else [path])
    ]


def hub_name(dataset: DatasetSettings) -> str | None:
    """The name of a data set on the Hub, ORG/NAME; None for files here or at a URL."""
    path = dataset.path
    match = _HUB_NAME.fullmatch(path)
    if path.startswith("hf://"):
        return match[1] if match else None
    is_here = Path(path).exists() or (Path(path).parent != Path() and Path(path).parent.exists())
    is_builder = path in FORMATS.values() and dataset.data_files
    return None if is_here or is_builder or not match or _format(path) else match[1]


def find_files(dataset: DatasetSettings) -> Splits:
    """The files of each split of a data set that lies here or at a URL; no split is empty.

    A folder's splits are named by its files: ``train.csv``, ``dev-00000-of-00002.parquet``.

    Raises:
        UserError: there is no such file; says what there is.
    """
    with reachable(dataset.path):
        splits = _find_files(dataset)
    if not splits or not all(splits.values()):
        raise UserError(f"{dataset.path}: data_files names no file for a split; name one")
    return splits


def _find_files(dataset: DatasetSettings) -> Splits:
    root, builder = dataset.path, ""
    if dataset.path in FORMATS.values() and dataset.data_files and not Path(root).exists():
        root, builder = "", dataset.path  # load_dataset("csv", data_files=...)
    if dataset.data_dir:
        root = f"{root.rstrip('/')}/{dataset.data_dir}" if root else dataset.data_dir
    if dataset.data_files is not None:
        patterns = dataset.data_files
        by_split = patterns if isinstance(patterns, dict) else {"train": patterns}
        return {
            split: [
                file
                for pattern in ([each] if isinstance(each, str) else each)
                for file in _matching(root, pattern, builder)
            ]
            for split, each in by_split.items()
        }
    system, path = _open(root)
    if not system.exists(path):
        raise UserError(f"{root}: no such file or folder{_what_there_is(system, path)}")
    if not system.isdir(path):
        return {"train": [_file(root, path, system, builder)]}
    if any(system.exists(f"{path}/{name}") for name in SAVED):
        return {"train": [File(root, path, system, "saved")]}
    return _splits_of_folder(root, path, system)


def _splits_of_folder(root: str, path: str, system: "AbstractFileSystem") -> Splits:
    """The data files right in a folder, or else in its sub-folders, which name the splits then."""
    names = sorted(name.removeprefix(path).strip("/") for name in system.find(path, maxdepth=2))
    names = [name for name in names if _format(name) and not re.search(r"(^|/)[._]", name)]
    names = [name for name in names if name not in OTHER_JSON]
    names = [name for name in names if "/" not in name] or names
    splits: dict[str, list[File]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        file = _file(f"{root.rstrip('/')}/{name}", f"{path}/{name}", system)
        stem = last.removesuffix(_suffix(last))
        split = _SHARD.sub("", stem)
        if folder and not guess([split], ("train", *VALIDATION)):
            split = folder
        splits.setdefault(split, []).append(file)
    if not splits:
        endings = ", ".join(FORMATS)
        raise UserError(
            f"{root}: no data file in this folder{_what_there_is(system, path + '/x')};"
            f" rows are read from {endings}"
        )
    for split, files in splits.items():
        if len({_suffix(file.name) for file in files}) > 1:
            listed = " and ".join(file.name for file in files)
            raise UserError(f"{root}: {listed} are both {split}; say data_files: {{{split}: FILE}}")
    return splits


def _matching(root: str, pattern: str, builder: str) -> list[File]:
    """The files that an entry of `data_files` names, relative to the root."""
    is_whole = "://" in pattern or pattern.startswith("/")
    prefix = "" if is_whole or root in ("", ".") else f"{root.rstrip('/')}/"
    name = f"{prefix}{pattern}"
    system, path = _open(name)
    if system.isfile(path):
        return [_file(name, path, system, builder)]
    base = "" if is_whole else f"{_open(root)[1]}/"
    paths: list[str] = []
    if glob.has_magic(pattern):
        matching = system.glob(path if is_whole else f"{glob.escape(base)}{pattern}")
        paths = [each for each in sorted(matching) if system.isfile(each)]
    if not paths:
        raise UserError(f"{name}: no such file{_what_there_is(system, path)}")
    names = [f"{prefix}{each.removeprefix(base)}" for each in paths]
    if "://" in pattern:
        names = [system.unstrip_protocol(each) for each in paths]
    return [_file(name, path, system, builder) for name, path in zip(names, paths, strict=True)]


def _open(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a path or URL, and the path in it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url or ".")
    except ImportError as error:  # says which package to install
        raise UserError(f"{url}: {error}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a file, a folder, a URL, or ORG/NAME") from error
    return system, str(path).rstrip("/")


def _file(name: str, path: str, system: "AbstractFileSystem", builder: str = "") -> File:
    if kind := builder or _format(path):
        return File(name, path, system, kind)
    endings = ", ".join(FORMATS)
    raise UserError(f"{name}: the ending of its name is not one of {endings} (.gz may follow)")


def _suffix(name: str) -> str:
    """The ending of a file's name, such as ".csv.gz"; "" if it is not of rows."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    suffix = f"{suffixes[-1]}{packed}" if suffixes and suffixes[-1] in FORMATS else ""
    return name[len(name) - len(suffix) :] if suffix else ""


def _format(name: str) -> str | None:
    suffix = _suffix(name.split("?")[0] if "://" in name else name).lower()
    return FORMATS[f".{suffix.split('.')[1]}"] if suffix else None


def _what_there_is(system: "AbstractFileSystem", path: str) -> str:
    """The end of a message about a file that is not there: what lies in its folder."""
    folder, _, wanted = path.rpartition("/")
    try:
        names = sorted(
            Path(entry["name"]).name + "/" * (entry["type"] == "directory")
            for entry in system.ls(folder, detail=True)
        )
    except (OSError, ValueError):
        return f"; nor is there a folder {Path(folder).name}" if folder else ""
    names = [name for name in names if not name.startswith(".")]
    rows = [name for name in names if _format(name)] or names
    listed = f"{', '.join(rows[:8])}{', ...' if len(rows) > 8 else ''}"
    verb = "is" if len(rows) == 1 else "are"
    return f"; there {verb} {listed or 'no files'}{hint(wanted, rows)}"


# ---------------------------------------------------------------------------------------------
# Which splits are read


def choose_splits(
    dataset: DatasetSettings, splits: Sequence[str], place: str
) -> tuple[str | None, list[str]]:
    """The split to train on, and those to validate on, of the splits that there are.

    The validation is empty where rows are to be split off for it.

    Raises:
        UserError: a split that the settings name is not there, or none can be guessed.
    """
    listed = " and ".join(splits)
    there = f"there {'is' if len(splits) == 1 else 'are'} {listed}"
    example = f"say data_files: {{train: FILE, validation: FILE}}, or splits, for {listed}"
    named = dataset.splits.train
    train = named
    if named is not None and named not in splits:
        guesses = guess(splits, ("train", "training")) if named == "train" else []
        if named != "train":
            raise UserError(f"{place}: no split {named}; {there}{hint(named, splits)}")
        if len(guesses) != 1 and len(splits) != 1:
            raise UserError(f"{place}: no split train; {example}")
        train = (guesses or list(splits))[0]
    wanted = dataset.splits.validation
    wanted = [wanted] if isinstance(wanted, str) else wanted
    others = [split for split in splits if split != train]
    if dataset.validation_size is not None:
        if wanted != ["validation"]:
            raise UserError(
                f"{place}: validation_size and splits.validation contradict each other; say one"
            )
        return train, []
    if wanted == ["validation"] and "validation" not in others:
        return train, guess(others, VALIDATION)
    if train in wanted:
        raise UserError(f"{place}: {train} is for training and validation; say validation_size")
    if wrong := [split for split in wanted if split == "train" or not _NAME.fullmatch(split)]:
        raise UserError(
            f"{place}: a validation split cannot be called {wrong[0]!r}; name it in data_files"
        )
    if missing := [split for split in wanted if split not in others]:
        raise UserError(f"{place}: no split {missing[0]}; {there}{hint(missing[0], splits)}")
    return train, list(dict.fromkeys(wanted))


def guess(splits: Sequence[str], words: Sequence[str]) -> list[str]:
    """The splits that are called by the first of the words that any of them has in its name.

    >>> guess(["reviews_dev", "test"], VALIDATION)
    ['reviews_dev']
    """
    for word in words:
        if word in splits:
            return [word]
        if named := [split for split in splits if word in re.split(r"[^a-z]+", split.lower())]:
            return named
    return []


# ---------------------------------------------------------------------------------------------
# The Hub


def pin(dataset: DatasetSettings, name: str) -> str:
    """The commit that a data set's revision names. UserError as `download` says."""
    return _snapshot(name, dataset.revision, ["README.md"]).name


def download(dataset: DatasetSettings, name: str, revision: str) -> Path:
    """The folder of a data set's files, in the Hub's cache; of its configuration alone.

    Raises:
        UserError: the Hub cannot be reached, or has no such data set, revision or configuration.
    """
    folder = _snapshot(name, revision, ["README.md"])
    configs = _configurations(folder)
    if patterns := dataset.data_files:
        lists = patterns.values() if isinstance(patterns, dict) else [patterns]
        files = [x for each in lists for x in ([each] if isinstance(each, str) else each)]
        files = [f"{dataset.data_dir}/{file}" if dataset.data_dir else file for file in files]
    elif dataset.name is None and not configs:
        files = [f"{dataset.data_dir}/*"] if dataset.data_dir else ["*"]
    elif dataset.name is None or dataset.name in configs:
        config = configs[dataset.name] if dataset.name else _only(configs, name)
        files = _paths(config)
    elif configs:
        known = f"{', '.join(configs)}{hint(dataset.name, configs)}"
        raise UserError(f"{name}: no configuration {dataset.name}; there are {known}")
    else:  # a folder for each configuration
        files = [f"{dataset.name}/*"]
    return _snapshot(name, folder.name, ["README.md", *files])


def hub_files(dataset: DatasetSettings, snapshot: Path) -> Splits:
    """The files of each split of a downloaded data set, as its card or their names say.

    Raises:
        UserError: there are none, or the configuration is unknown.
    """
    import datasets

    name, folder = dataset.name, dataset.data_dir
    if name and name not in _configurations(snapshot):
        name, folder = None, folder or name
    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(
                str(snapshot), name, data_dir=folder, data_files=dataset.data_files, cache_dir=cache
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).replace(f"{snapshot}", dataset.path).splitlines()[0]
            raise UserError(f"{dataset.path}: {reason:.300}") from error
    classes = class_names(builder.info.features or {})
    system, _ = _open(str(snapshot))
    return {
        str(split): [
            _file(path.replace(str(snapshot), dataset.path), path, system)._replace(classes=classes)
            for path in map(str, files)
        ]
        for split, files in builder.config.data_files.items()
    }


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column that holds classes, or lists of them."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(each.names) for name, each in inner.items() if getattr(each, "names", None)}


def _configurations(snapshot: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a data set's card lists, by name."""
    if not (snapshot / "README.md").is_file():
        return {}
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard.load(snapshot / "README.md", ignore_metadata_errors=True).data
        return {str(config["config_name"]): config for config in data.get("configs") or ()}
    except (TypeError, ValueError, KeyError):  # a card that is no card
        return {}


def _only(configs: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The configuration that is meant if none is named."""
    defaults = [config for config in configs.values() if config.get("default")]
    choice = defaults or ([configs["default"]] if "default" in configs else list(configs.values()))
    if len(choice) == 1:
        return choice[0]
    raise UserError(f"{name}: it has several configurations; say name: {' or '.join(configs)}")


def _paths(config: Mapping[str, Any]) -> list[str]:
    """The patterns of a configuration's files."""
    files = config.get("data_files") or "*"
    items = files if isinstance(files, list) else [files]
    paths = [item["path"] if isinstance(item, dict) else item for item in items]
    flat = [x for each in paths for x in ([each] if isinstance(each, str) else each)]
    folder = config.get("data_dir")
    return [f"{folder}/{path}" if folder else path for path in flat]


def _snapshot(name: str, revision: str, files: Sequence[str]) -> Path:
    from httpx2 import HTTPError  # of the HTTP client of huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from fmn.store import hub

    disable_progress_bars()
    api = hub.connect()
    try:
        path = api.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=list(files)
        )
    except (HTTPError, OSError, ValueError) as error:  # ValueError: a revision of forbidden letters
        raise UserError(
            f"{name}@{revision}: no such data set from the Hub ({type(error).__name__}); check the"
            " name, --revision and the network, or use files that are here"
        ) from error
    return Path(path)
