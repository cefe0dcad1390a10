"""A coverage-guided fuzz run over what reads headers and manifests: bytes are read, or refused as a UserError.

    python -m tests.fuzz [-runs=N] [-max_total_time=SECONDS] [CORPUS]

`make torture` runs it; CORPUS is tests/corpus, to which libFuzzer adds what reaches new code. Needs atheris.
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

PLACE = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108


def attempt(data: bytes) -> None:
    """The first byte says what the others are: a safetensors file, an index, a manifest, metrics or a recipe."""
    if not data:
        return
    kind, content = data[0] % 6, data[1:]
    name = (
        headers.WEIGHTS,
        headers.INDEX,
        artifacts.MANIFEST,
        "metrics.json",
        recipe.RECIPE,
        headers.WEIGHTS,
    )[kind]
    path = PLACE / name
    path.write_bytes(content)
    try:
        if kind == 0:
            headers.file_headers(path)
        elif kind == 1:
            headers.weight_map(path)
        elif kind == 2:
            artifacts.read_manifest(PLACE)
        elif kind == 3:
            artifacts.read_json(path)
        elif kind == 4:
            recipe.read_recipe(PLACE)
        else:
            statistics.read_statistic(path, statistics.GramMetadata)
    except UserError as error:
        if "\n" in str(error) or str(PLACE) not in str(error):
            raise AssertionError(f"not a line that names the file: {error}") from error
    finally:
        path.unlink()


def main() -> None:
    atheris.Setup([*sys.argv, "-dict=tests/corpus.dict"], attempt)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


if __name__ == "__main__":
    main()
