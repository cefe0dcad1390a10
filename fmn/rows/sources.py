"""Find the files of a task's data set by split: on this machine, at a URL, or on the Hub.

Nothing that comes with a data set is executed, and nothing is cached but what the Hub gives.
"""

import glob
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fmn.errors import UserError, hint
from fmn.rows import images
from fmn.store import artifacts
from fmn.tasks.task import DatasetSettings, TaskSettings, in_a_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMATS: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", ".txt"), "conll"),
}
OTHER_JSON = ("task.json", "fmn.json", "dataset_infos.json")  # JSON files that are not rows
IMAGE_FOLDER = "imagefolder"  # what `datasets.load_dataset` calls a folder of images, `data_dir`
VALIDATION = ("validation", "valid", "dev", "val", "eval", "test")  # the first that exists is used
_HUB_NAME = re.compile(r"(?:hf://)?(?:datasets/)?([\w.-]+(?:/[\w.-]+)?)")
_TEXT = re.compile(r"(?i)\.txt(\.gz)?$")
_ROWS = re.compile(rf"(.*?)(-\d+(-of-\d+)?)?({'|'.join(map(re.escape, FORMATS))})(\.gz)?", re.I)


class File(NamedTuple):
    """A file or folder of rows; `name` is its name in messages."""

    name: str
    path: str
    system: "AbstractFileSystem"
    # One of FORMATS; or, of a folder, saved (`save_to_disk`) or images.
    format: str
    classes: Mapping[str, Sequence[str]] = MappingProxyType({})  # class names by column

    @property
    def local(self) -> Path | None:
        """The path on this machine, relative if it is below the working directory; or None."""
        if "file" not in self.system.protocol:
            return None
        path = Path(self.path)
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    def digest(self) -> Path | str:
        """This file in a stage's key: its local path, or the digest of a remote file."""
        if path := self.local:
            return path
        with reachable(self.name):
            parts = sorted(self.system.find(self.path))
            digests = [artifacts.digest_bytes(self.system.cat_file(part)) for part in parts]
        return artifacts.digest_bytes("".join(digests).encode())


Splits = Mapping[str, Sequence[File]]


@contextmanager
def reachable(name: str) -> Iterator[None]:
    """Convert errors of finding and reading rows at a URL to a UserError."""
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
    paths = [file.local for files in find_files(dataset).values() for file in files]
    return [
        file
        for path in paths
        if path
        for file in (artifacts.visible(path).values() if path.is_dir() else [path])
    ]


def hub_name(dataset: DatasetSettings) -> str | None:
    """The name of a data set on the Hub, ORG/NAME; None for files here or at a URL."""
    path = dataset.path
    match = _HUB_NAME.fullmatch(path)
    if path.startswith("hf://"):
        return match[1] if match else None
    if path == IMAGE_FOLDER and dataset.data_dir:
        return None
    is_here = Path(path).exists() or (Path(path).parent != Path() and Path(path).parent.exists())
    return None if is_here or not match or _ROWS.fullmatch(path) else match[1]


def find_files(dataset: DatasetSettings) -> Splits:
    """The files of each split of a data set that lies here or at a URL; no split is empty.

    The names of a folder's files are those of its splits: ``train.csv``,
    ``dev-00000-of-00002.parquet``.

    Raises:
        UserError: there is no such file; says what there is.
    """
    root, patterns = dataset.path, dataset.data_files
    if dataset.data_dir and root == IMAGE_FOLDER:
        root = dataset.data_dir
    elif dataset.data_dir:
        root = f"{root.rstrip('/')}/{dataset.data_dir}"
    with reachable(root):
        if patterns is None:
            return _splits_of(root)
        by_split = patterns if isinstance(patterns, dict) else {"train": patterns}
        splits = {split: _matching(root, each) for split, each in by_split.items()}
    if not splits or not all(splits.values()):
        raise UserError(f"{dataset.path}: data_files names no file for a split; name one")
    return splits


def _splits_of(root: str) -> Splits:
    """The splits of a file, or of a folder."""
    system, path = _open(root)
    if not system.exists(path):
        if "://" in root:
            raise UserError(f"{root}: not there, or not to be reached; check address and network")
        if os.path.islink(path):  # noqa: PTH114 - a path of fsspec's
            raise UserError(f"{root}: {artifacts.absent(Path(path))}; correct the link")
        raise UserError(f"{root}: no such file or folder{_what_there_is(system, path)}")
    if not system.isdir(path):
        return {"train": [_file(root, path, system)]}
    names = _names(system, path)
    if "state.json" in names:  # `save_to_disk` wrote it, of one split; or of several
        return {"train": [File(root, path, system, "saved")]}
    if "dataset_dict.json" in names:
        return {
            name[:-1]: [File(f"{root}/{name[:-1]}", f"{path}/{name[:-1]}", system, "saved")]
            for name in names
            if system.exists(f"{path}/{name}state.json")
        }
    splits: dict[str, list[File]] = {}
    own = [name for name in names if name not in OTHER_JSON and not name.startswith("_")]
    rows = {name: match[1] for name in own if (match := _ROWS.fullmatch(name))}
    # A text file next to other files describes them.
    for name in [name for name in rows if not _TEXT.search(name)] or rows:
        file = _file(f"{root.rstrip('/')}/{name}", f"{path}/{name}", system)
        splits.setdefault(rows[name], []).append(file)
    if not splits:
        folders = images.split_folders(system, path, ("train", "training", *VALIDATION))
        for split, folder in folders.items():
            file = File(f"{root.rstrip('/')}{folder.removeprefix(path)}", folder, system, "images")
            splits[split] = [file._replace(name=str(file.local)) if file.local else file]
    if not splits:
        raise UserError(
            f"{root}: no data file in this folder{_what_there_is(system, path + '/x')}; rows are"
            f" read from {', '.join(FORMATS)}, and images from CLASS/NAME.png; say data_dir or"
            " data_files"
        )
    for split, files in splits.items():
        if len({file.format for file in files}) > 1:
            listed = " and ".join(file.name for file in files)
            both = "both" if len(files) == 2 else "all"
            remedy = f"say data_files: {{{split}: FILE}}"
            raise UserError(f"{root}: {listed} are {both} {split}; {remedy}")
    return splits


def _matching(root: str, patterns: str | Sequence[str]) -> list[File]:
    """The files that the patterns of a split name, relative to the root."""
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        is_whole = "://" in pattern or pattern.startswith("/")
        name = pattern if is_whole else f"{root.rstrip('/')}/{pattern}"
        system, path = _open(name)
        if system.isfile(path):
            files.append(_file(name, path, system))
            continue
        base = "" if is_whole else _open(root)[1] + "/"
        escaped = glob.escape(base) + path.removeprefix(base)  # a folder may be called [x]
        matching = sorted(filter(system.isfile, system.glob(escaped)))
        if not matching:
            raise UserError(f"{name}: no such file{_what_there_is(system, path)}")
        files += [_file(system.unstrip_protocol(each), each, system) for each in matching]
    return files


def _open(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a path or URL, and the path in it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # ImportError says which package to install
        raise UserError(f"{url}: {error}; give a file, a folder, a URL, or ORG/NAME") from error
    return system, str(path).rstrip("/")


def local_system() -> "AbstractFileSystem":
    """The file system of this machine."""
    return _open("/")[0]


def _file(name: str, path: str, system: "AbstractFileSystem") -> File:
    match = _ROWS.fullmatch(path.split("?")[0] if "://" in name else path)
    if match is None:
        endings = ", ".join(FORMATS)
        raise UserError(f"{name}: the ending of its name is not one of {endings} (.gz may follow)")
    file = File(name, path, system, FORMATS[match[4].lower()])
    return file._replace(name=str(file.local)) if file.local else file


def _names(system: "AbstractFileSystem", folder: str) -> list[str]:
    """The names in a folder that are not hidden; those of folders end in a slash."""
    names = [
        Path(entry["name"]).name + "/" * (entry["type"] == "directory")
        for entry in system.ls(folder, detail=True)
    ]
    return sorted(name for name in names if not name.startswith("."))


def _what_there_is(system: "AbstractFileSystem", path: str) -> str:
    """The end of a message about a missing file: the files in its folder."""
    folder, _, wanted = path.rpartition("/")
    try:
        names = _names(system, folder)
    except (OSError, ValueError):
        return f"; nor is there a folder {Path(folder).name}" if folder else ""
    rows = [name for name in names if _ROWS.fullmatch(name) and not _TEXT.search(name)] or names
    verb = "is" if len(rows) == 1 else "are"
    return f"; there {verb} {in_a_line(rows, 8) or 'no files'}{hint(wanted, rows)}"


# ---------------------------------------------------------------------------------------------
# Choosing the splits to read


def choose_splits(
    dataset: DatasetSettings, splits: Sequence[str], place: str
) -> tuple[str | None, list[str]]:
    """Choose the split to train on and the splits to validate on.

    There are no validation splits if rows of the training split will be split off for them.

    Raises:
        UserError: a split that the settings name is not there, or none can be guessed.
    """
    train, wanted = dataset.splits.train, dataset.splits.validations
    if train == "train" and train not in splits:
        guesses = guess(splits, ("train", "training")) or splits
        if len(guesses) > 1:
            listed = " and ".join(splits)
            raise UserError(
                f"{place}: no split train; say data_files: {{train: FILE, validation: FILE}}, or"
                f" splits, for {listed}"
            )
        train = guesses[0]
    others = [split for split in splits if split != train]
    if dataset.validation_size is not None:
        wanted = []
    elif wanted == ["validation"] and "validation" not in others:
        wanted = guess(others, VALIDATION)
    for split in [train, *wanted]:
        if split is not None and split not in splits:
            listed = " and ".join(splits)
            there = f"there {'is' if len(splits) == 1 else 'are'} {listed}{hint(split, splits)}"
            raise UserError(f"{place}: no split {split}; {there}")
    if both := {train, "train"} & set(wanted):
        raise UserError(f"{place}: {both.pop()} is for training; name another split to validate on")
    return train, wanted


def used_splits(
    dataset: DatasetSettings, files: Splits, place: str
) -> tuple[str | None, dict[str, Sequence[File]]]:
    """The split to train on, if any, and the files of every split that is used; raises as above."""
    if dataset.splits.train is None and list(files) == ["train"]:  # a single file
        files = {"validation": files["train"]}
    train, validation = choose_splits(dataset, list(files), place)
    return train, {split: files[split] for split in [train, *validation] if split is not None}


def guess(splits: Sequence[str], words: Sequence[str]) -> list[str]:
    """The splits named by a word: the first of `words` that is in any split's name.

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
    return download_card(name, dataset.revision).name


def download(dataset: DatasetSettings, name: str, revision: str) -> Path:
    """Download the files of a data set's configuration; returns their folder in the Hub's cache.

    Raises:
        UserError: the Hub cannot be reached, or has no such data set, revision or configuration.
    """
    folder = download_card(name, revision)
    return _snapshot(name, folder.name, ["README.md", *_patterns(dataset, folder)])


def download_card(name: str, revision: str) -> Path:
    """The folder of a data set's card alone; UserError as `download` says."""
    return _snapshot(name, revision, ["README.md"])


def matching_names(dataset: DatasetSettings, snapshot: Path, names: Iterable[str]) -> list[str]:
    """Those of a data set's files that `download` takes; `snapshot` has its card."""
    from huggingface_hub.utils._paths import filter_repo_objects

    return list(filter_repo_objects(names, allow_patterns=_patterns(dataset, snapshot)))


def _patterns(dataset: DatasetSettings, snapshot: Path) -> list[str]:
    """The files to download: those that the settings or the card name, or else all rows."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    files: Any = dataset.data_files
    folder, card = dataset.data_dir, snapshot / "README.md"
    if not files and card.is_file():
        with _understood(dataset):
            data = DatasetCard.load(card, ignore_metadata_errors=True).data
            configs = MetadataConfigs.from_dataset_card_data(data)
            config = configs.get(dataset.name or configs.get_default_config_name(), {})
        if configs and not config:
            known = f"{', '.join(configs)}{hint(dataset.name or '', configs)}"
            raise UserError(f"{dataset.path}: say one of its configurations, name: {known}")
        files, folder = config.get("data_files"), config.get("data_dir") or folder
    endings = [ending for ending, form in FORMATS.items() if form != "conll"]
    patterns = sanitize_patterns(files or [f"*{ending}*" for ending in endings])
    prefix = f"{folder}/" if folder else ""
    return [f"{prefix}{pattern}" for each in patterns.values() for pattern in each]


@contextmanager
def _understood(dataset: DatasetSettings) -> Iterator[None]:
    """Turn errors of `datasets`, which a card can cause, into a UserError that explains them."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{dataset.path}: its card or files cannot be read ({reason:.300}); say data_files,"
            " data_dir or name, or use files that are here"
        ) from error


def hub_files(dataset: DatasetSettings, snapshot: Path) -> Splits:
    """The files of each split of a downloaded data set, by its card or by the files' names.

    Raises:
        UserError: the data set has no files of rows.
    """
    import datasets

    fields = dataset.model_dump(include={"name", "data_dir", "data_files"})
    with tempfile.TemporaryDirectory() as cache, _understood(dataset):
        builder = datasets.load_dataset_builder(str(snapshot), cache_dir=cache, **fields)
    classes = class_names(builder.info.features or {})
    system, root = _open(str(snapshot))
    return {
        str(split): [
            _file(path, path, system)._replace(
                name=path.replace(root, dataset.path), classes=classes
            )
            for path in map(str, files)
        ]
        for split, files in builder.config.data_files.items()
    }


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column that holds classes, or lists of them."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(each.names) for name, each in inner.items() if getattr(each, "names", None)}


def _snapshot(name: str, revision: str, files: Sequence[str]) -> Path:
    from httpx2 import HTTPError  # raised by the HTTP client of huggingface_hub
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
