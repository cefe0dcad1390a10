"""Share files among machines at an fsspec URL.

A file's path is ``files/AB/ABCD...``, the sha256 of its bytes, which is checked after a download.
Everything may be removed while nothing runs: missing files are stored again.
"""

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from flows.workers import TransientError
from fmn.errors import UserError
from fmn.store import artifacts
from fmn.store.stage import read_sidecar, sidecar_path

Digests = Mapping[str, str]  # sha256 of each file by its name, relative to a folder


def digest_files(path: Path) -> dict[str, str]:
    """The digests of a folder's files, or of a file, its sidecar, and the files listed there.

    Names are relative to the folder, or to the folder of the file. Hidden files are left out.
    """
    if path.is_dir():
        files = artifacts.visible(path)
    else:
        sidecar = read_sidecar(path)
        names = {path.name, sidecar_path(path).name, *(sidecar.files if sidecar else ())}
        files = {name: path.with_name(name) for name in names if path.with_name(name).is_file()}
    return {name: artifacts.digest_file(file) for name, file in sorted(files.items())}


class Storage:
    """The files at an fsspec URL.

    Raises:
        UserError: there is no such file system, or the package that reads it is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._uploading = threading.Lock()  # so that no file is uploaded twice at once
        try:
            self._system, self._root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"storage {url}: {error}") from error

    def put(self, folder: Path, digests: Digests) -> None:
        """Store the files of a folder that are not stored yet."""
        for name, digest in digests.items():
            place = self._place(digest)
            with self._uploading:
                if self._system.exists(place):
                    continue
                if "file" not in self._system.protocol:  # object stores write whole files
                    self._system.put_file(str(folder / name), place)
                else:
                    with artifacts.atomic_file(Path(place)) as partial:
                        shutil.copyfile(folder / name, partial)

    def get(self, folder: Path, digests: Digests) -> None:
        """Fetch files into a folder; equal files are hard links of one another.

        Raises:
            TransientError: a file is missing, or was damaged and is now removed; the next attempt
                stores it again.
        """
        fetched: dict[str, Path] = {}
        for name, digest in digests.items():
            path, place = folder / name, self._place(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            if digest in fetched:
                os.link(fetched[digest], path)
                continue
            try:
                self._system.get_file(place, str(path))
            except FileNotFoundError:
                message = f"{self.url}: {name} ({place}) is missing; all machines must see this URL"
                raise TransientError(message) from None
            if artifacts.digest_file(path) != digest:
                self._system.rm_file(place)
                raise TransientError(f"{self.url}: {name} ({place}) was damaged, and is removed")
            fetched[digest] = path

    def _place(self, digest: str) -> str:
        return f"{self._root}/files/{digest[:2]}/{digest}"
