"""Images in folders by class, and in the columns of tables."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from fmn.errors import UserError
from fmn.tasks.images import decoded

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LEFT_BY_SYSTEMS = ("Thumbs.db", "desktop.ini")  # added by operating systems


def files_in(system: "AbstractFileSystem", folder: str) -> list[str]:
    """The files below a folder by their paths in it, sorted, without hidden ones."""
    paths = (PurePosixPath(path).relative_to(folder) for path in system.find(folder))
    visible = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(str(path) for path in visible if path.name not in _LEFT_BY_SYSTEMS)


def split_folders(
    system: "AbstractFileSystem", folder: str, words: Sequence[str]
) -> dict[str, str]:
    """The folder of each split of a folder of images: SPLIT/CLASS/NAME.png, or CLASS/NAME.png.

    It is empty for a folder without images in folders.

    Args:
        words: what splits are called.

    Raises:
        UserError: some folders are called like splits, and others are not.
    """
    images = [PurePosixPath(name) for name in files_in(system, folder) if _is_image(name)]
    tops = {path.parts[0] for path in images if len(path.parts) > 1}
    splits = {path.parts[0] for path in images if len(path.parts) > 2 and path.parts[0] in words}
    if splits and splits != tops:
        raise UserError(
            f"{folder}: {', '.join(sorted(splits))} is a split, and {min(tops - splits)} is none;"
            " keep images as SPLIT/CLASS/NAME.png, or as CLASS/NAME.png"
        )
    return {split: f"{folder}/{split}" for split in splits} or ({"train": folder} if tops else {})


def read_folder(system: "AbstractFileSystem", folder: str, place: str) -> dict[str, list[Any]]:
    """The images of a split, the class of each, and its file's path in the folder, by column.

    Raises:
        UserError: a file is no image, or is in no class's folder.
    """
    names = files_in(system, folder)
    for name in names:
        if not _is_image(name):
            endings = ", ".join(ENDINGS)
            raise UserError(f"{place}/{name}: is not one of {endings}; convert it or take it away")
        if "/" not in name:
            raise UserError(f"{place}/{name}: is in no class's folder; move it into one")
    contents = [system.cat_file(f"{folder}/{name}") for name in names]
    classes = [PurePosixPath(name).parts[0] for name in names]
    return {"image": contents, "label": classes, "file": names}


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def checked(values: Sequence[Any], place: str, files: Sequence[Any] = ()) -> list[bytes]:
    """The bytes of images, after checking that each can be decoded.

    Args:
        values: bytes, or a structure of `bytes` and `path`, as `datasets.Image` has it.
        place: what messages call the column.
        files: where the images come from.

    Raises:
        UserError: names the first row that holds no image, or one that fmn does not take.
    """
    contents = []
    for row, value in enumerate(values):
        content = value.get("bytes") if isinstance(value, Mapping) else value
        try:
            if not isinstance(content, bytes):
                raise ValueError(f"is {value!r:.60}, not the bytes of an image")
            decoded(content)
        except ValueError as error:
            name = f" ({files[row]!s:.80})" if len(files) else ""
            problem = f"the image in row {row}{name} {error}"
            raise UserError(f"{place}: {problem}; replace it, or drop the row") from error
        contents.append(content)
    return contents
