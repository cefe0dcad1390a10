"""The one stage rule: an output is whole, intact, and made from today's inputs and settings.

A stage is a function from files to files that ends in `run_stage`. Beside its output lies the
`Sidecar`: what the output was made from, how long that took, and the sha256 of its files.
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
    """What a stage did.

    Attributes:
        computed: False if the output was there already.
        seconds: run time; of the computation, if another machine computed the output.
        summary: what the stage reports of its output.
    """

    stage: str
    out: Path
    computed: bool
    seconds: float
    summary: R


# Set by a flow that computes on a cluster: it is called with ``out`` in place of the stage's own
# computation, and must put there what another machine computed, sidecar included.
remote: ContextVar[Callable[[Path], None] | None] = ContextVar("remote", default=None)


# Where it is set, a stage that would have to compute raises NotCurrentError instead.
only_current: ContextVar[bool] = ContextVar("only_current", default=False)


class NotCurrentError(UserError):
    """An output is missing, damaged, or of other inputs or settings, and must not be computed."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


class InputChangedError(UserError, FileNotFoundError):
    """An input is missing, or was replaced while a stage read it; flows retry the stage."""


class Sidecar(Record):
    """How an output came about; beside a file as ``NAME.fmn.json``, in a folder as ``fmn.json``.

    Attributes:
        key: content key: the digest of the stage, its version, its settings and its inputs.
        files: sha256 by name of every file of the output; names are relative to the folder, or to
            the folder that holds the file.
        inputs: digest by name of everything that the stage read.
        settings: everything else that the output depends on.
        seconds: run time of the computation, on the machine that computed it.
        info: what the stage reports of its output; the stage's own record.
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
    """What a stage's computation needs to know.

    Attributes:
        path: where to write: an empty folder, or the name of the output file. Files that belong to
            an output file may be written beside it; they appear together with it.
        key, inputs: as in `Sidecar`.
    """

    path: Path
    key: str
    inputs: Mapping[str, str]


def sidecar_path(out: Path) -> Path:
    """Where the sidecar of an output lies."""
    return out / artifacts.SIDECAR if out.is_dir() else out.with_name(f"{out.name}.fmn.json")


def read_sidecar(out: Path) -> Sidecar | None:
    """The sidecar of an output; None where there is none that can be read."""
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
    """The record in a JSON file, which must still be what its sidecar says, if it has one.

    Raises:
        UserError: there is no such file, it was changed, or it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = "not JSON" if path.is_file() else "no such file"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    check_intact(path)
    return parse_record(content, record, path, remedy)


def check_intact(out: Path) -> None:
    """Refuse an output with a sidecar whose files are not those that the stage wrote.

    Raises:
        UserError: names the file that is missing, was added, or changed.
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
    """Compute an output unless it is there, intact, and made from these very inputs and settings.

    The output appears whole or not at all; one process at a time computes it.

    Args:
        version: raised when the same inputs and settings give another output than before.
        compute: writes to ``job.path`` and returns what the sidecar is to say of the output.
        reads: what the stage reads, by name: a file, a folder, several files, or a digest that is
            known already. None is left out.
        settings: what else the output depends on. Of a `Settings` model, those that only say where
            or how fast to compute (`Settings.runtime`) are left out.
        summary: reads back what the stage reports, from the output.
        is_timed: whether the sidecar says how long the computation took. Without that, an output
            that is computed again has the same bytes, sidecar included.

    Raises:
        NotCurrentError: the output is to be computed, where `only_current` forbids that.
        InputChangedError: another process removes or replaces an input meanwhile.
        UserError: an input is missing or damaged; the output would replace an input, what fmn did
            not write, or what another stage wrote; or the disk, the memory or a permission does
            not suffice.
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


def _is_current(out: Path, key: str) -> bool:
    """Whether an output was made for this content key and is still what was written."""
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
        finally:  # another process may have changed an input, whatever came of that
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

    The sidecar comes first: if the process is killed in between, the files are not what it says,
    and the next run computes them again.

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
    """Refuse an output that would change an input, or replace what the stage did not write.

    Args:
        reads: what the stage reads; only paths, and lists of paths, matter.
        stage: the stage's name; without it, the output of any stage may be replaced.
    """
    if out.name in ("", "..") or (out.exists() and out.is_dir() != is_folder):
        raise UserError(f"--out {out}: name a {'folder' if is_folder else 'file'} of its own")
    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file and no folder; {_REMEDY}")
    target = Path(os.path.realpath(out))
    each = [path for read in reads for path in (read if isinstance(read, list | tuple) else [read])]
    for path in (path for path in each if isinstance(path, Path)):
        source = Path(os.path.realpath(path))  # which takes a loop of links as it is
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
    """The digest of each input, which must still be what its sidecar says."""
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
    if not read.exists():
        with artifacts.locked(read):  # DVC removes an output before its stage writes it anew
            pass
    if not read.exists():
        raise InputChangedError(f"{read}: no such file or folder; check the path")
    check_intact(read)
    return artifacts.digest_folder(read) if read.is_dir() else artifacts.digest_file(read)


def _plain(value: Any) -> Any:
    """A setting as JSON has it, without what only says where or how fast to compute."""
    if isinstance(value, BaseModel):
        runtime = value.runtime if isinstance(value, Settings) else None
        return value.model_dump(mode="json", by_alias=True, exclude=runtime)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
