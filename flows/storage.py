"""Files that several machines share by an fsspec URL: stored under their sha256, and checked by it on arrival.

::

    files/AB/ABCD...        a file's bytes, by their digest
    made/REQUEST.json       what a stage made for a request: its files, and the seconds that it took
    sums/REQUEST/NAME       partial sums of a Fisher that is under way
    probes/NAME             what a flow wrote to see whether its workers see it; removed at once

All of it may be removed while nothing runs: what is missing is put there, or made, again.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from flows.faults import PassingError
from fmn.errors import UserError
from fmn.merge import recipe
from fmn.store import artifacts


class File(NamedTuple):
    """A file's sha256, in hexadecimal, and its size in bytes."""

    digest: str
    size: int


Tree = Mapping[
    str, File
]  # the files of a folder by their relative names; of a single file, by its name


class Made(NamedTuple):
    """What a stage made: its output and what belongs beside it, and the seconds that it took."""

    files: Tree
    seconds: float


_busy: defaultdict[str, threading.Lock] = defaultdict(
    threading.Lock
)  # by digest, so that no file is put twice at once


def tree(path: Path, only: tuple[str, ...] = ()) -> dict[str, File]:
    """The files of a folder, or a single file; nothing hidden, and no merged model's card, which is no part of it.

    Args:
        path: the folder, or the file.
        only: folders in it; all of them when empty.
    """
    if path.is_file():
        return {path.name: _file(path)}
    card = recipe.CARD if recipe.is_merged(path) else None
    return {
        name: _file(file) for name, file in artifacts.visible(path, only).items() if name != card
    }


def digest(files: Tree) -> str:
    """One digest for a tree."""
    return artifacts.digest_bytes(
        artifacts.canonical({name: list(file) for name, file in files.items()})
    )


def _file(path: Path) -> File:
    return File(artifacts.digest_file(path), path.stat().st_size)


class Storage:
    """The folder at an fsspec URL.

    Raises:
        UserError: when there is no such file system, or what reads it is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self.system, self.root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"storage {url}: {error}") from error

    def probe(self) -> str:
        """Write a small file and read it again; returns its name. UserError where that cannot be done."""
        name, text = f"probes/{uuid.uuid4().hex}", b"fmn"
        try:
            self._write(name, text)
            if self._read(name) != text:
                raise OSError("what was written is not what is read")
        except Exception as error:  # a file system's own kinds, of which there are many
            raise UserError(
                f"storage {self.url}: cannot be written and read ({_reason(error)}); give it the rights, or another URL"
            ) from error
        return name

    def sees(self, name: str) -> str | None:
        """None when what `probe` wrote elsewhere is here too; else why not."""
        try:
            return None if self._read(name) == b"fmn" else "other bytes than were written"
        except Exception as error:
            return _reason(error)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder; nothing where it is not there."""
        with suppress(FileNotFoundError):
            self.system.rm(f"{self.root}/{name}", recursive=True)

    def put(self, folder: Path, files: Tree) -> int:
        """Store the files of a tree that are not stored yet; returns how many bytes travelled."""
        travelled = 0
        for name, file in files.items():
            with _busy[file.digest]:
                if self._size(_place(file)) != file.size:
                    self._put(folder / name, _place(file))
                    travelled += file.size
        return travelled

    def get(self, folder: Path, files: Tree) -> None:
        """Fetch a tree into a folder; files of the same bytes are links of one.

        Raises:
            PassingError: naming the file that is not there, or is not what was put there; it is removed, so that the
                next attempt puts it there anew.
        """
        first: dict[str, Path] = {}
        for name, file in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.digest in first:
                os.link(first[file.digest], path)
                continue
            self._fetch(path, name, file)
            first[file.digest] = path

    def _fetch(self, path: Path, name: str, file: File) -> None:
        place = _place(file)
        try:
            self.system.get_file(f"{self.root}/{place}", str(path))
        except FileNotFoundError:
            raise PassingError(f"{self.url}/{place}: {name} is not there any more") from None
        if artifacts.digest_file(path) != file.digest:
            path.unlink()
            self.remove(place)
            raise PassingError(
                f"{self.url}/{place}: not the {name} that was put there, and removed"
            )

    def made(self, request: str) -> Made | None:
        """What was made for a request earlier, if that can be read."""
        try:
            found = json.loads(self._read(f"made/{request}.json"))
            return Made(
                {name: File(*file) for name, file in found["files"].items()},
                float(found["seconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, request: str, folder: Path, made: Made) -> None:
        """Store what was made for a request, and then say so."""
        self.put(folder, made.files)
        content = {
            "files": {name: list(file) for name, file in made.files.items()},
            "seconds": made.seconds,
        }
        self._write(f"made/{request}.json", artifacts.canonical(content))
        self.remove(f"sums/{request}")

    def take(self, request: str, made: Made, out: Path) -> None:
        """Put what was made whole in its place: the output last, and before it what belongs beside it.

        Raises PassingError as `get` does; what was made is forgotten then, and the next attempt makes it again.
        """
        tops = sorted(
            {name.partition("/")[0] for name in made.files}, key=lambda top: top == out.name
        )
        try:
            for top in tops:
                target = out.with_name(top)
                inside = {
                    name.removeprefix(f"{top}/"): file
                    for name, file in made.files.items()
                    if name.startswith(f"{top}/")
                }
                if inside:
                    with artifacts.whole_folder(target) as folder:
                        self.get(folder, inside)
                else:
                    with artifacts.whole_file(target) as file:
                        self._fetch(file, top, made.files[top])
        except PassingError:
            self.remove(f"made/{request}.json")
            raise

    def save_sums(self, request: str, path: Path) -> None:
        """Store partial sums, so that another machine can go on from them."""
        self._put(path, f"sums/{request}/{path.name}")

    def get_sums(self, request: str, folder: Path) -> None:
        """Fetch the partial sums of a request, if any; the stage itself looks whether it can read them."""
        where = f"{self.root}/sums/{request}"
        if self.system.exists(where):
            for path in self.system.ls(where, detail=False):
                self.system.get_file(path, str(folder / Path(path).name))

    def _size(self, name: str) -> int | None:
        try:
            return int(self.system.info(f"{self.root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(f"{self.root}/{name}"))

    def _write(self, name: str, content: bytes) -> None:
        with self._whole(name) as target:
            self.system.pipe_file(target, content)

    def _put(self, path: Path, name: str) -> None:
        with self._whole(name) as target:
            self.system.put_file(str(path), target)

    @contextmanager
    def _whole(self, name: str) -> Iterator[str]:
        """A place to write a file that takes its name when the block ends well; object stores write whole files."""
        path = f"{self.root}/{name}"
        if "file" not in self.system.protocol:
            yield path
            return
        self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        partial = Path(f"{path}.{uuid.uuid4().hex}")
        try:
            yield str(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _place(file: File) -> str:
    return f"files/{file.digest[:2]}/{file.digest}"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Cache:
    """A machine's own folder of inputs that came from the storage, each tree by its digest.

    Where the disk has no room for one more, those go that were used longest ago.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trees").mkdir(parents=True, exist_ok=True)

    def tree(self, storage: Storage, files: Tree, needed: set[str]) -> Path:
        """The folder of a tree, fetched where it is not there or not intact; PassingError as `Storage.get` raises it.

        Args:
            storage: where it comes from.
            files: the tree.
            needed: digests of trees that must not go.
        """
        path = self.folder / "trees" / digest(files)
        if not path.is_dir() or tree(path) != files:
            self._make_room(
                sum({file.digest: file.size for file in files.values()}.values()), needed
            )
            with artifacts.whole_folder(path) as folder:
                storage.get(folder, files)
        now = time.time()
        os.utime(path, (now, now))
        return path

    def _make_room(self, size: int, needed: set[str]) -> None:
        others = [path for path in (self.folder / "trees").iterdir() if path.name not in needed]
        for path in sorted(others, key=lambda one: one.stat().st_mtime):
            if shutil.disk_usage(self.folder).free > 1.2 * size:
                return
            shutil.rmtree(path)
