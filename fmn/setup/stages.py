"""The stages before a run: `init` writes a settings file, `check` checks whether it can run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmn import params
from fmn.errors import UserError
from fmn.rows.stages import MINIATURE, quickstart_files
from fmn.store import artifacts
from fmn.store.records import Record
from fmn.store.yaml_file import read_yaml

if TYPE_CHECKING:
    from fmn.setup.check import Checked


class InitInfo(Record):
    """The result of `fmn init`: the kind of each task, and the settings to fill in.

    Attributes:
        unknown: by setting, why it could not be known; the file has the same as comments.
        problem: why the file is not valid yet, if it is not.
    """

    tasks: dict[str, str]
    base: str
    unknown: dict[str, str]
    problem: str = ""


def write_quickstart(params_file: Path) -> list[Path]:
    """Write what the quick start needs into a working folder that has no settings file.

    Args:
        params_file: the settings file of the run; nothing is written unless its name is
            `params.yaml`, the default, and the folder has no YAML file, which may hold settings.

    Returns:
        what was written.
    """
    here, files = Path(), quickstart_files()
    if params_file != Path("params.yaml") or [*here.glob("*.yaml"), *here.glob("*.yml")]:
        return []
    rows = [
        path for suffix in ("parquet", "csv") for path in (files / MINIATURE).rglob(f"*.{suffix}")
    ]
    for path in (
        *rows,
        files / params_file,
    ):  # the settings last: with them, the folder is complete
        target = path.relative_to(files)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with artifacts.atomic_file(target) as partial:
                shutil.copyfile(path, partial)
    return [params_file, Path(MINIATURE)]


def init(
    sources: Sequence[str], *, out: Path, base: str | None = None, force: bool = False
) -> InitInfo:
    """Write a settings file for experts, from their small files alone.

    Args:
        sources: of the experts, as `fetch` takes them; a PEFT adapter too.
        out: the file, whose name is also that of the registered model.
        base: the source of the model that they were fine-tuned from; default: as they say.
        force: whether a file that is there is replaced.

    Raises:
        UserError: a source cannot be read, or the file is there.
    """
    from fmn.setup.guess import guess, settings_text

    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file, --out")
    if out.exists() and not force:
        raise UserError(f"{out}: is there already; name another --out, or replace it with --force")
    guesses = [guess(source, base) for source in sources]
    name = "fmn" if out.stem == "params" else out.stem
    text, unknown = settings_text(guesses, base, name)
    with artifacts.atomic_file(out) as path:
        path.write_text(text)
    content, problem = read_yaml(out), ""
    try:
        params.validate(content, str(out))
    except UserError as error:
        problem = str(error)
    kinds = [each.in_words for each in guesses]
    tasks = dict(zip(content["experts"]["tasks"], kinds, strict=True))
    return InitInfo(tasks=tasks, base=content["base"], unknown=unknown, problem=problem)


def check(settings_file: Path) -> "Checked":
    """All that can be known of a run before anything large is downloaded or computed.

    Args:
        settings_file: the settings of the run.
    """
    from fmn.setup.check import check

    return check(settings_file)
