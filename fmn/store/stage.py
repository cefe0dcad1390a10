"""The rule of all stages: compute an output unless it exists, intact, for these inputs.

A stage is a function from files to files that ends in `run_stage`. Each output has a `Sidecar`: its
inputs and settings, the run time, and the sha256 of its files.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pydantic import BaseModel, Field
from typing_extensions import TypeVar

from fmn import __version__
from fmn.errors import UserError, system_errors_explained
from fmn.store import artifacts
from fmn.store.records import Record, Settings, parse_record

Progress = Callable[[int, int], None]  # takes (done, total)
Reads = Mapping[str, Path | Sequence[Path] | str | None]
_REMEDY = "choose another --out"
R = TypeVar("R", default=Any)
T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """The result of a stage.

    Attributes:
        stage: its name.
        out: its output.
        computed: False if the output was up to date.
        seconds: the run time; if another machine computed the output, the run time there.
        summary: facts about the output.
    """

    stage: str
    out: Path
    computed: bool
    seconds: float
    summary: R


# A flow that computes on a cluster sets this. It is called with ``out`` instead of the stage's own
# computation, and puts the output and the sidecar of another machine there.
remote: ContextVar[Callable[[Path], None] | None] = ContextVar("remote", default=None)


# If it is set, a stage whose output is not up to date raises NotCurrentError.
only_current: ContextVar[bool] = ContextVar("only_current", default=False)


class NotCurrentError(UserError):
    """An output is not up to date, and must not be computed (`only_current`)."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


class InputChangedError(UserError, FileNotFoundError):
    """An input is missing, or was replaced while a stage read it; flows retry the stage."""


class Sidecar(Record):
    """The origin of an output; beside a file as ``NAME.fmn.json``, in a folder as ``fmn.json``.

    Attributes:
        stage: the stage's name.
        key: content key: the digest of the stage, its version, its settings and its inputs.
        files: sha256 of every file of the output; names are relative to the folder, or to the
            folder of the file.
        inputs: digests of everything that the stage read, by name.
        settings: everything else that the output depends on.
        seconds: run time of the computation.
        fmn: the version of fmn.
        info: the stage's own record about its output.
    """

    format: int = 2
    stage: str
    key: str
    files: dict[str, str]
    inputs: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    fmn: str = __version__
    info: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The arguments of a stage's computation.

    Attributes:
        path: where to write: an empty folder, or the path of the output file. Files that belong to
            an output file may be written beside it; they are published together.
        key, inputs: as in `Sidecar`.
    """

    path: Path
    key: str
    inputs: Mapping[str, str]


def sidecar_path(out: Path) -> Path:
    """The path of an output's sidecar."""
    return out / artifacts.SIDECAR if out.is_dir() else out.with_name(f"{out.name}.fmn.json")


def read_sidecar(out: Path) -> Sidecar | None:
    """Read the sidecar of an output; None if there is none, or if it cannot be read."""
    try:
        return Sidecar.model_validate_json(sidecar_path(out).read_bytes())
    except (OSError, ValueError):
        return None


def read_info(out: Path, record: type[T]) -> T:
    """What a stage reported of its output.

    Raises:
        UserError: there is no sidecar, or it holds something else.
    """
    sidecar = read_sidecar(out)
    if sidecar is None:
        raise UserError(f"{out}: there is no {sidecar_path(out).name} of fmn's; make {out} again")
    return parse_record(sidecar.info, record, sidecar_path(out))


def write_record(path: Path, record: Record) -> None:
    """Write a record as a JSON file of its own."""
    path.write_text(record.model_dump_json(indent=1, by_alias=True) + "\n")


def read_record(path: Path, record: type[T], remedy: str = "make it again") -> T:
    """Read a record from a JSON file.

    Raises:
        UserError: the file does not exist, differs from its sidecar, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = "not JSON" if path.is_file() else "no such file"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    check_intact(path)
    return parse_record(content, record, path, remedy)


def check_intact(out: Path) -> None:
    """Raise a UserError if the files of an output differ from its sidecar, if it has one.

    The message names the file that is missing, was added, or changed.
    """
    if damage := _damage(out):
        raise UserError(f"{damage}; make {out} again")


def _damage(out: Path) -> str | None:
    path = sidecar_path(out)
    if not path.is_file():
        return None
    sidecar, folder = read_sidecar(out), path.parent
    if sidecar is None:
        return f"{path}: not as fmn writes it"
    if out.is_dir():
        digests = artifacts.digest_files(out)
    else:
        present = {name: folder / name for name in sidecar.files if (folder / name).is_file()}
        digests = {name: artifacts.digest_file(file) for name, file in present.items()}
    name = artifacts.differing(sidecar.files, digests)
    return f"{folder / name}: not what was written there" if name else None


def run_stage(
    name: str,
    version: int,
    out: Path,
    compute: Callable[[Job], Record | None],
    *,
    reads: Reads,
    settings: Mapping[str, Any],
    summary: Callable[[Path], R],
    is_folder: bool = False,
    is_timed: bool = True,
) -> Outcome[R]:
    """Compute an output, unless it exists, intact, for these inputs and settings.

    The output appears whole or not at all. Only one process at a time computes it.

    Args:
        name: the stage's name.
        version: raise it if the same inputs and settings give another output than before.
        out: the output.
        compute: writes to ``job.path``, and returns the record for the sidecar's `info`.
        reads: the inputs by name: a file, a folder, several files, or a digest. None is ignored.
        settings: everything else that the output depends on. Fields of `Settings` in
            `Settings.runtime` are ignored.
        summary: reads facts about the output from it.
        is_folder: whether the output is a folder.
        is_timed: whether the sidecar has the run time. Without it, an output that is computed
            again has the same bytes, sidecar included.

    Raises:
        NotCurrentError: the output is not up to date, and `only_current` is set.
        InputChangedError: another process removed or replaced an input.
        UserError: an input is missing or damaged; the output would replace an input, files that
            fmn did not write, or another stage's output; or disk, memory or permissions are
            insufficient.
    """
    started = time.monotonic()
    with system_errors_explained(out):
        check_output(out, reads.values(), is_folder, name)
        inputs = _digests(reads)
        described = {what: _plain(value) for what, value in settings.items()}
        key = artifacts.content_key(name, version, described, inputs)
        with artifacts.locked(out):
            computed, compute_elsewhere = not _is_current(out, key), remote.get()
            if computed and only_current.get():
                raise NotCurrentError(f"{out}: not up to date; run {name}")
            if computed and compute_elsewhere:
                compute_elsewhere(out)
                if not _is_current(out, key):
                    raise UserError(
                        f"{out}: the cluster computed something else than these inputs and"
                        " settings ask for; install the same fmn everywhere"
                    )
            elif computed:
                about = Sidecar(stage=name, key=key, files={}, inputs=inputs, settings=described)
                _compute(out, compute, about, reads, is_folder, is_timed)
        seconds = time.monotonic() - started
        if computed and compute_elsewhere and (sidecar := read_sidecar(out)):
            seconds = sidecar.seconds
        return Outcome(name, out, computed, seconds, summary(out))


def if_current(function: Callable[[], Outcome[R]]) -> Outcome[R] | None:
    """The outcome of a stage, or None if it would have to compute its output."""
    allowed = only_current.set(True)
    try:
        return function()
    except NotCurrentError:
        return None
    finally:
        only_current.reset(allowed)


def _is_current(out: Path, key: str) -> bool:
    """Whether an output has this content key and is intact."""
    sidecar = read_sidecar(out)
    return sidecar is not None and sidecar.key == key and _damage(out) is None


def _compute(
    out: Path,
    compute: Callable[[Job], Record | None],
    about: Sidecar,
    reads: Reads,
    is_folder: bool,
    is_timed: bool,
) -> None:
    started = time.monotonic()
    with artifacts.scratch_folder(out) as scratch:
        path = scratch if is_folder else scratch / out.name
        try:
            info = compute(Job(path, about.key, about.inputs))
        finally:  # an error may be due to an input that another process changed
            _check_unchanged(reads, about.inputs)
        results = {
            "files": artifacts.digest_files(scratch),
            "seconds": round(time.monotonic() - started, 3) if is_timed else 0.0,
            "info": info.model_dump(mode="json", by_alias=True) if info else {},
        }
        name = artifacts.SIDECAR if is_folder else f"{out.name}.fmn.json"
        write_record(scratch / name, about.model_copy(update=results))
        if is_folder:
            artifacts.publish_folder(scratch, out)
        else:
            publish_file(scratch, out)


def publish_file(scratch: Path, out: Path) -> None:
    """Move an output file, its sidecar and the files that belong to it out of a scratch folder.

    The sidecar is moved first: if the process is killed in between, the files differ from it, and
    the next run computes them again.

    Raises:
        UserError: a file beside the output has a needed name, and fmn did not write it.
    """
    path, sidecar = sidecar_path(out), read_sidecar(out)
    is_damaged = path.is_file() and sidecar is None
    own = {out.name, path.name, *(sidecar.files if sidecar else ())}
    for name in sorted({file.name for file in scratch.iterdir()} - own):
        if out.with_name(name).exists() and not is_damaged:
            problem = f"fmn did not make it, and {out.name} needs that name"
            raise UserError(f"{out.with_name(name)}: {problem}; {_REMEDY}, or remove it")
    artifacts.publish_files(scratch, out.parent, first=path.name)


def check_output(out: Path, reads: Iterable[Any], is_folder: bool = True, stage: str = "") -> None:
    """Raise a UserError if an output would change an input, or replace files of another origin.

    Args:
        out: the output.
        reads: the stage's inputs; only paths, and lists of paths, are checked.
        is_folder: whether the output is a folder.
        stage: the stage's name; without it, the output of any stage may be replaced.
    """
    if out.name in ("", "..") or (out.exists() and out.is_dir() != is_folder):
        raise UserError(f"--out {out}: name a {'folder' if is_folder else 'file'} of its own")
    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file and no folder; {_REMEDY}")
    target = Path(os.path.realpath(out))
    each = [path for read in reads for path in (read if isinstance(read, list | tuple) else [read])]
    for path in (path for path in each if isinstance(path, Path)):
        source = Path(os.path.realpath(path))  # does not raise on a loop of links
        is_model = any((source / name).is_file() for name in ("merge.json", "config.json"))
        if target == source or target in source.parents or (is_model and source in target.parents):
            raise UserError(f"--out {out}: would change {path}, which is read; {_REMEDY}")
    sidecar = read_sidecar(out)
    if sidecar and stage not in ("", sidecar.stage):
        problem = f"holds the output of `fmn {sidecar.stage}`"
        raise UserError(f"--out {out}: {problem}; {_REMEDY}, or remove it")
    has_content = any(out.iterdir()) if out.is_dir() else out.exists() and out.stat().st_size
    if has_content and not sidecar_path(out).is_file():
        raise UserError(f"--out {out}: fmn did not make it; {_REMEDY}, or remove it")


def _digests(reads: Reads) -> dict[str, str]:
    """The digest of each input; UserError if one is missing or differs from its sidecar."""
    try:
        return {what: _digest(read) for what, read in reads.items() if read is not None}
    except InputChangedError:
        raise
    except FileNotFoundError as error:  # between the listing of a folder and the reading
        message = f"{error.filename}: was removed while it was read; run again"
        raise InputChangedError(message) from error


def _check_unchanged(reads: Reads, inputs: Mapping[str, str]) -> None:
    try:
        digests = _digests(reads)
    except UserError as error:
        raise InputChangedError(error) from error
    if what := artifacts.differing(inputs, digests):
        raise InputChangedError(f"the input {what} changed while it was read; run again")


def _digest(read: Path | Sequence[Path] | str) -> str:
    if isinstance(read, str):
        return read
    if not isinstance(read, Path):
        return artifacts.digest_bytes("".join(map(_digest, read)).encode())
    if not read.exists():  # DVC removes an output before its stage writes it: wait for that
        with artifacts.locked(read):
            pass
    if not read.exists():
        raise InputChangedError(f"{read}: no such file or folder; check the path")
    check_intact(read)
    return artifacts.digest_folder(read) if read.is_dir() else artifacts.digest_file(read)


def _plain(value: Any) -> Any:
    """A setting as plain JSON data, without the fields in `Settings.runtime`."""
    if isinstance(value, BaseModel):
        runtime = value.runtime if isinstance(value, Settings) else None
        return value.model_dump(mode="json", by_alias=True, exclude=runtime)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
