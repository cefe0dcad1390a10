"""Files of the Hub are what their digests say; tests/models/test_sources.py has a whole Hub."""

import hashlib
from pathlib import Path

import pytest

from fmn.store import hub


@pytest.mark.parametrize("large", [True, False])
def test_a_file_is_checked_by_the_digest_that_names_it(tmp_path: Path, large: bool) -> None:
    content = b"weights"
    blob = hashlib.sha1(b"blob 7\0" + content)  # noqa: S324 - git's own
    path = tmp_path / (hashlib.sha256(content) if large else blob).hexdigest()
    path.write_bytes(content)
    link = tmp_path / "config.json"
    link.symlink_to(path)
    assert hub._is_intact(link)
    path.write_bytes(b"wEights")
    assert not hub._is_intact(link)


def test_progress_is_in_bytes_of_the_file() -> None:
    reports: list[tuple[int, int]] = []
    with hub._meter(lambda done, total: reports.append((done, total)))(
        total=10, initial=2, desc="a file"
    ) as meter:
        meter.update(3)
        meter.update(5.0)
    assert reports == [(5, 10), (10, 10)]
