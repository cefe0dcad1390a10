"""A coverage-guided fuzz run over what reads headers and JSON: bytes are read, or a UserError.

    python -m tests.fuzz [-runs=N] [-max_total_time=SECONDS] [CORPUS]

`make torture` runs it; CORPUS is tests/corpus, to which libFuzzer adds what reaches new code. It
needs atheris.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fmn"]):
    from fmn.errors import UserError
    from fmn.fisher import files as statistics
    from fmn.merge import recipe
    from fmn.models import headers
    from fmn.store import artifacts
    from fmn.evaluate.files import Metrics
    from fmn.store.stage import read_record, read_sidecar

MEMORY = Path("/dev/shm")  # noqa: S108
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz", dir=MEMORY if MEMORY.is_dir() else None))
NAMES = (
    headers.WEIGHTS,
    headers.INDEX,
    artifacts.SIDECAR,
    "metrics.json",
    recipe.RECIPE,
    headers.WEIGHTS,
)


def attempt(data: bytes) -> None:
    """Read bytes as the kind of file that the first byte tells."""
    if not data:
        return
    kind, content = data[0] % len(NAMES), data[1:]
    path = FOLDER / NAMES[kind]
    path.write_bytes(content)
    try:
        if kind == 0:
            headers.file_headers(path)
        elif kind == 1:
            headers.weight_map(path)
        elif kind == 2:
            read_sidecar(FOLDER)
        elif kind == 3:
            read_record(path, Metrics)
        elif kind == 4:
            recipe.read_recipe(FOLDER)
        else:
            statistics.read_statistic(path, statistics.GramMetadata)
    except UserError as error:
        if "\n" in str(error) or str(FOLDER) not in str(error):
            raise AssertionError(f"not a line that names the file: {error}") from error
    finally:
        path.unlink()


def main() -> None:
    atheris.Setup([*sys.argv, "-dict=tests/corpus.dict"], attempt)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
