"""Old names of what is in `fmn.errors`; goes when the last caller has moved."""

from pathlib import Path

from fmn.errors import UserError, causes, system_error, system_errors_explained

origins = causes
refusals_told = system_errors_explained


def refusal(error: BaseException, place: Path | None = None) -> UserError | None:
    return None if isinstance(error, UserError) else system_error(error, place)
