"""A coverage-guided fuzz run over what reads files (`tests.readers`): bytes are read, or refused.

    python -m tests.fuzz [-runs=N] [-max_total_time=SECONDS] [CORPUS]

`make torture` runs it; CORPUS is tests/corpus, to which libFuzzer adds what reaches new code. It
needs atheris.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import atheris
import datasets  # noqa: F401  # so that the first input does not wait for it
import peft  # noqa: F401

with atheris.instrument_imports(include=["fmn"]):
    from tests import readers

MEMORY = Path("/dev/shm")  # noqa: S108
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz", dir=MEMORY if MEMORY.is_dir() else None))


def attempt(data: bytes) -> None:
    """Read bytes as the kind of file that the first byte tells."""
    if data:
        readers.attempt(data[0], data[1:], FOLDER)


def main() -> None:
    atheris.Setup([*sys.argv, "-dict=tests/corpus.dict"], attempt)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
