"""The quick start's scores in the README: a table, and a picture in light and dark.

python -m benchmarks.quickstart --add data/quickstart  # stores the numbers that `fmn run` left
python -m benchmarks.quickstart  # what `make results` does: writes the table and the picture
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.results import DOCS, STORE, parser, processor, with_tables

README = DOCS.parent / "README.md"
PICTURES = DOCS / "pictures"
MODELS = {
    "base": "the base below each expert's head",
    "average": "plain average",
    "paper": "the paper's rule",
    "mask-fisher": "mask-fisher, with our scale",
    "merged": "auto: the best of several methods",
    "calibrated": "then calibrated",
    "realigned": "then heads re-aligned",
    "realigned-own-1": "and an own last layer for each",
}
HEADLINE = "realigned"
THEMES = {  # of the text, of marks on the axis, of bars, of the registered model's bar, of lines
    "light": ("#1f2328", "#59636e", "#8c959f", "#0072b2", "#d1d6dc"),
    "dark": ("#e6edf3", "#9198a1", "#656c76", "#56b4e9", "#3d444d"),
}
WIDTH, ROW, LEFT, TOP = 760, 30, 270, 52  # pixels
SCALE = (WIDTH - LEFT - 60) / 100  # pixels for a percent


def add(work: Path) -> None:
    """Store the numbers of a run with where they come from."""
    numbers = json.loads((work / "report" / "results.json").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    content = {
        "command": "fmn run",
        "commit": commit.stdout.strip(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": time.strftime("%Y-%m-%d"),
        "results": numbers,
    }
    (STORE / "quickstart.json").write_text(json.dumps(content, indent=1) + "\n")


def means(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The mean score of each model and what it keeps of the experts' scores, in percent."""
    return {
        name: (100 * mean["score"], 100 * mean["relative"])
        for name, mean in results["mean"].items()
        if name in MODELS or name == "expert"
    }


def table(name: str) -> str:
    """The README's table of a stored run."""
    stored = json.loads((STORE / f"{name}.json").read_text())
    results = stored["results"]
    tasks = list(results["tasks"])
    lines = [
        f"| in percent | {' | '.join(tasks)} | mean | of the experts |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for model, (mean, share) in means(results).items():
        scores = [f"{100 * results['tasks'][task][model]['score']:.1f}" for task in tasks]
        cells = [
            MODELS.get(model, "the experts, six models"),
            *scores,
            f"{mean:.1f}",
            f"{share:.1f}",
        ]
        is_headline = model == HEADLINE
        lines.append(f"| {' | '.join(f'**{cell}**' if is_headline else cell for cell in cells)} |")
    origin = f"{stored['machine']}, {stored['date']}, commit {stored['commit']}"
    return "\n".join(lines) + f"\n\n{origin}.\n"


def picture(results: Mapping[str, Any], theme: Sequence[str]) -> str:
    """What each merged model keeps of its experts' scores, as bars."""
    ink, soft, bar, best, line = theme
    shares = {name: share for name, (_, share) in means(results).items() if name in MODELS}
    height = TOP + ROW * len(shares) + 14
    title = "What a merged model keeps of its experts' scores, in percent"
    in_words = ", ".join(f"{MODELS[name]} {share:.1f}" for name, share in shares.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' font-family="system-ui, sans-serif" font-size="14" fill="{ink}">',
        f"<title>{title}</title><desc>{escape(in_words)}</desc>",
        f'<text x="0" y="20" font-weight="600">{title}</text>',
    ]
    for percent in (0, 50, 100):
        x = LEFT + SCALE * percent
        parts.append(f'<path d="M{x:.1f} {TOP - 6}V{height - 8}" stroke="{line}"/>')
        words = "100, the experts" if percent == 100 else str(percent)
        parts.append(f'<text x="{x:.1f}" y="{TOP - 12}" font-size="11" text-anchor="middle"'
                     f' fill="{soft}">{words}</text>')  # fmt: skip
    for place, (name, share) in enumerate(shares.items()):
        y, is_headline = TOP + ROW * place, name == HEADLINE
        weight = ' font-weight="600"' if is_headline else ""
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end"{weight}>{MODELS[name]}</text>',
            f'<rect x="{LEFT}" y="{y + 3}" width="{SCALE * share:.1f}" height="{ROW - 10}"'
            f' fill="{best if is_headline else bar}"/>',
            f'<text x="{LEFT + SCALE * share + 6:.1f}" y="{y + 18}"{weight}>{share:.1f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--add", type=Path, metavar="WORK")
    if work := options.parse_args().add:
        add(work)
    README.write_text(with_tables(README.read_text(), table))
    results = json.loads((STORE / "quickstart.json").read_text())["results"]
    PICTURES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        (PICTURES / f"quickstart-{name}.svg").write_text(picture(results, theme))


if __name__ == "__main__":
    main()
