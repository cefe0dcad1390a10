"""What comes before a run: `init` writes a settings file, `check` says whether it can run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmn import params
from fmn.errors import UserError
from fmn.store import artifacts
from fmn.store.records import Record
from fmn.store.yaml_file import read_yaml

if TYPE_CHECKING:
    from fmn.setup.check import Checked


class InitInfo(Record):
    """What `fmn init` reports: the kind of each task, and what has to be filled in.

    Attributes:
        unknown: by setting, why it could not be known; the file has the same as comments.
        problem: why the file is not valid yet, if it is not.
    """

    tasks: dict[str, str]
    base: str
    unknown: dict[str, str]
    problem: str = ""


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
