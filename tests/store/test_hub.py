"""What the Hub gives; tests/models/test_sources.py has a whole Hub, which also misbehaves."""

from fmn.store import hub


def test_progress_is_in_bytes_of_the_file() -> None:
    reports: list[tuple[int, int]] = []
    with hub._meter(lambda done, total: reports.append((done, total)))(
        total=10, initial=2, desc="a file"
    ) as meter:
        meter.update(3)
        meter.update(5.0)
    assert reports == [(5, 10), (10, 10)]
