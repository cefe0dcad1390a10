"""The tables of docs/results.md and docs/performance.md, from stored results.

    python -m benchmarks.results --add study-0 data/study-0/compare/study/tables --command "..."
    python -m benchmarks.results  # what `make results` does: writes every table from docs/results/

`--add` stores what a comparison or a benchmark left in a folder, `results.json` and `table.md`,
under docs/results/ with the commit, the machine and the date of today. A table of a page stands
between `<!-- NAME -->` and `<!-- end -->`; nothing there is typed by hand.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
STORE = DOCS / "results"
PAGES = (DOCS / "results.md", DOCS / "performance.md")
# A program's own beginning: `spent(work)` has seconds and the peak of the resident set above what
# it was before.
SPENT = """
import json, sys, time
from pathlib import Path
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
def spent(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began, cpu = resident("VmRSS:"), time.perf_counter(), time.process_time()
    work()
    times = {"seconds": time.perf_counter() - began, "cpu seconds": time.process_time() - cpu}
    return {**times, "peak": resident("VmHWM:") - before}
"""


def run(python: str | Path, code: str, *arguments: object) -> str:
    """The last line that a program prints."""
    environment = {"PYTHONPATH": str(DOCS.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command, environment = [python, "-c", code, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(" ".join(done.stderr.splitlines()[-3:]))
    return done.stdout.splitlines()[-1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of options whose help begins with a module's docstring as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def keep(out: Path, numbers: Mapping[str, Any], table: str) -> None:
    """Write a benchmark's numbers and table into the folder `out`, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": processor(), "load": os.getloadavg(), **numbers}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text(table)
    print(table)


def summary(values: Sequence[float]) -> dict[str, float]:
    """The median and the extremes of several rounds."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The summary of the ratios of two contestants, round by round."""
    return summary([a / b for a, b in zip(first, second, strict=True)])


def spread(rounds: Mapping[str, float], digits: int = 2) -> str:
    """A summary as text: the median, and the extremes in brackets."""
    return "{median:.{0}f} ({least:.{0}f} to {most:.{0}f})".format(digits, **rounds)


def processor() -> str:
    """The processor as Linux calls it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return match[1] if match else platform.machine()


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


def with_tables(page: str, text: Callable[[str], str] = section) -> str:
    """The page with every table put in its place.

    Args:
        page: Markdown.
        text: gives the table of a name; by default the stored one.
    """
    place = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
    return place.sub(lambda match: f"<!-- {match[1]} -->\n{text(match[1])}<!-- end -->", page)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--add", nargs=2, metavar=("NAME", "TABLES"))
    options.add_argument("--command", default="")
    arguments = options.parse_args()
    if arguments.add:
        add(arguments.add[0], Path(arguments.add[1]), arguments.command)
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
