"""Choose the files of a checkpoint's weights, and convert pickled weights to safetensors."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fmn.errors import UserError
from fmn.sources import forms, names
from fmn.store.headers import INDEX, PICKLED, WEIGHTS

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")


def shards(files: Iterable[str], ending: str) -> list[str]:
    """All shards among files with this ending; empty if there are no shards.

    Raises:
        UserError: one is missing, or there are those of several checkpoints.
    """
    matches = {name: match for name in files if (match := _SHARD.fullmatch(name))}
    matches = {name: match for name, match in matches.items() if match[4] == ending}
    if len({match[3] for match in matches.values()}) > 1:
        raise UserError(f"has shards of several checkpoints: {', '.join(sorted(matches))}")
    if not matches:
        return []
    stem, number, total, _ = next(iter(matches.values())).groups()
    width, count = len(number), int(total)
    expected = [f"{stem}-{part:0{width}}-of-{total}.{ending}" for part in range(1, count + 1)]
    if missing := [name for name in expected if name not in matches][:5]:
        listed = ", ".join(missing)
        raise UserError(f"has no index of its {count} shards, and lacks {listed}; get them too")
    return expected


def pickled_shards(files: Iterable[str]) -> list[str]:
    """The pickled weights among files: one file, or shards."""
    files = list(files)
    return [PICKLED] if PICKLED in files else shards(files, "bin")


def choose(files: frozenset[str]) -> list[str]:
    """The files of a checkpoint's weights without the index; pickled files only if need be.

    Raises:
        UserError: there are no weights, or shards are missing.
    """
    if WEIGHTS in files:
        return [WEIGHTS]
    if weights := shards(files, "safetensors") or pickled_shards(files):
        return weights
    raise UserError(forms.no_weights(files))


def left_over(files: frozenset[str]) -> list[str]:
    """Notes about weights beside those that are taken: of an earlier save, most often."""
    others = [INDEX] if INDEX in files else []
    others += [name for name in files if _SHARD.fullmatch(name) and name.endswith(".safetensors")]
    if WEIGHTS not in files or not others:
        return []
    return [f"{WEIGHTS} is taken, as Transformers does, and not {', '.join(sorted(others)[:3])}"]


def unpickle_files(folder: Path) -> None:
    """Make safetensors of a folder's pickled weights, and an index where shards have none.

    Raises:
        UserError: a file is damaged, or holds more than tensors.
    """
    from safetensors.torch import save_file

    for name in pickled_shards(path.name for path in folder.iterdir()):
        path = folder / name
        target = name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = unpickle(path)
        path.unlink()
        save_file(tensors, folder / target, metadata={"format": "pt"})
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        names.write_index(folder)


def unpickle(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a pickled state dict, contiguous and sharing no memory.

    Raises:
        UserError: the file is damaged, or holds more than tensors.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not state or any(value.nbytes > path.stat().st_size for value in state.values()):
            raise ValueError("it is empty, or larger than the file")
        # Tied weights are written under each of their names; the model drops those that it ties.
        return {str(name): value.detach().contiguous().clone() for name, value in state.items()}
    except Exception as error:  # a hostile pickle can raise anything
        problem = "is damaged, or holds more than tensors; ask its author for safetensors"
        raise UserError(f"{path}: {problem}") from error
