"""The tables of docs/results.md and docs/performance.md, from stored results of comparisons and benchmarks.

    python -m benchmarks.results --add study-0 data/study-0/compare/study/tables --command "fmn compare study ..."
    python -m benchmarks.results        # what `make results` does: writes every table anew from docs/results/

`--add` keeps what a comparison or a benchmark left in a folder, `results.json` and `table.md`, under docs/results/ with
the commit, the machine and the date of today. A table of a page stands between `<!-- NAME -->` and `<!-- end -->`;
nothing there is typed by hand.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
STORE = DOCS / "results"
PAGES = (DOCS / "results.md", DOCS / "performance.md")


def keep(out: Path, numbers: Mapping[str, Any], table: str) -> None:
    """Write what a benchmark found into the folder `out`, and show its table."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": processor(), "load": os.getloadavg(), **numbers}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text(table)
    print(table)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Of rounds side by side: the median and the extremes."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of two contestants' rounds, one by one."""
    return summary([a / b for a, b in zip(one, other, strict=True)])


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """A summary as text: the median, and the extremes in brackets."""
    return "{median:.{0}f} ({least:.{0}f} to {most:.{0}f})".format(digits, **found)


def processor() -> str:
    """The processor as Linux calls it, or its architecture."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def add(name: str, tables: Path, command: str) -> None:
    """Store numbers and tables with where they come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    content = {
        "command": command,
        "commit": commit.stdout.strip(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": time.strftime("%Y-%m-%d"),
        "results": json.loads((tables / "results.json").read_text()),
        "table": (tables / "table.md").read_text(),
    }
    STORE.mkdir(exist_ok=True)
    (STORE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def section(name: str) -> str:
    """The text of what is stored under a name."""
    stored = json.loads((STORE / f"{name}.json").read_text())
    origin = (
        f"`{stored['command']}`, commit {stored['commit']}, {stored['machine']}, {stored['date']}."
    )
    return f"{origin}\n\n{stored['table'].strip()}\n"


def write(page: str, text: Callable[[str], str] = section) -> str:
    """The page with the text of every name put in its place: the stored table, where not said otherwise."""
    place = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
    return place.sub(lambda found: f"<!-- {found[1]} -->\n{text(found[1])}<!-- end -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", nargs=2, metavar=("NAME", "TABLES"))
    parser.add_argument("--command", default="")
    given = parser.parse_args()
    if given.add:
        add(given.add[0], Path(given.add[1]), given.command)
    for page in PAGES:
        page.write_text(write(page.read_text()))


if __name__ == "__main__":
    main()
