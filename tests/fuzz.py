"""A coverage-guided fuzz run over what reads headers and JSON: bytes are read, or a UserError.

    python -m tests.fuzz [-runs=N] [-max_total_time=SECONDS] [CORPUS]

`make torture` runs it; CORPUS is tests/corpus, to which libFuzzer adds what reaches new code. It
needs atheris.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fmn"]):
    from fmn.errors import UserError
    from fmn.evaluate.files import read_metrics
    from fmn.fisher import files as statistics
    from fmn.merge import recipe
    from fmn.models import headers
    from fmn.store import artifacts
    from fmn.store.stage import read_sidecar

MEMORY = Path("/dev/shm")  # noqa: S108
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz", dir=MEMORY if MEMORY.is_dir() else None))
READERS: list[tuple[str, Callable[[Path], object]]] = [
    (headers.WEIGHTS, headers.file_headers),
    (headers.INDEX, headers.weight_map),
    (artifacts.SIDECAR, lambda path: read_sidecar(path.parent)),
    ("metrics.json", read_metrics),
    (recipe.RECIPE, lambda path: recipe.read_recipe(path.parent)),
    (headers.WEIGHTS, lambda path: statistics.read_statistic(path, statistics.GramMetadata)),
]


def attempt(data: bytes) -> None:
    """Read bytes as the kind of file that the first byte tells."""
    if not data:
        return
    name, read = READERS[data[0] % len(READERS)]
    path = FOLDER / name
    path.write_bytes(data[1:])
    try:
        read(path)
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
