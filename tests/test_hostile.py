"""Settings are data: a hostile text in any of them is refused, or carried through unharmed."""

import copy
import csv
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows import compare, graph, pages
from fmn import params
from fmn.errors import UserError
from fmn.experiments.stages import CompareSettings
from fmn.registry import version
from fmn.registry.promotion import Decision
from fmn.registry.stages import Registered
from fmn.report import comparison, figures, page
from fmn.report.card import card
from fmn.report.stages import ReportInfo
from fmn.report.wording import markdown
from fmn.store.stage import Outcome
from fmn.store.yaml_file import read_yaml, to_yaml
from fmn.tasks.task import Columns, Task
from tests import reports
from tests.projects import dvc, fine_tune_elsewhere, flow, make_own_project, repro, run

CLEAN = "harmless"
HOSTILE = {
    "shell": "x; touch pwned; $(touch pwned) `touch pwned` & touch pwned | sh > pwned",
    "quotes": "'\"; touch pwned; '\"",
    "template": "{{ 7 * 7 }}{% for x in y %}${base}${{ secrets }}#{x}",
    "format": "{0.__class__} {} {base} %s %(a)s %n {:>999999999}",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'y',
    "comment": "<!-- registration --> ]]> </style></script></title>",
    "entity": "&lt;script&gt; &amp; &#60;b&#62;",
    "table": "a | b || c \\| d",
    "markup": "[x](javascript:alert(1)) ![x](http://evil/x.png) **b** _i_ ~~s~~ `c` # h <http://evil>",
    "math": "$\\frac{1}{2}$ \\(x\\)",
    "up": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "dots": "..",
    "backslashes": "..\\..\\windows",
    "url": "http://user:pw@evil.example/x?a=b&c=d#e",
    "file url": "file:///etc/passwd",
    "option": "--help",
    "glob": "*?[a-z]",
    "long": "x" * 5000,
    "space": " ",
    "yaml": "!!python/object:os.system [a, b]: {c: d} # e",
    "newline": "a\nb: c\n---\n# head",
    "carriage return": "a\rb",
    "tab": "a\tb",
    "nul": "a\0b",
    "escape": "a\x1b[2J\x1b]0;title\x07b",
    "line separator": "a\N{LINE SEPARATOR}b",
    "bidi": "a\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe\N{FIRST STRONG ISOLATE}",
}
HIDDEN = ("newline", "carriage return", "tab", "nul", "escape", "line separator", "bidi")
ALL = " ".join(text for kind, text in HOSTILE.items() if kind not in ("long", "space", *HIDDEN))

TASK = {
    "dataset": {
        "path": "rows",
        "name": "a",
        "revision": "a",
        "data_files": {"train": "a.csv", "validation": ["b.csv"]},
        "data_dir": "a",
        "splits": {"train": "train", "validation": ["validation"]},
    },
    "columns": {"text": "text", "text_pair": "pair", "label": "label"},
    "labels": {"0": "bad", "1": "good"},
    "metrics": ["accuracy"],
    "task": "text-classification",
    "problem_type": "single_label_classification",
}
LINKED = {"layers": "layers.{}", "heads": ["o", "q=q k=k v=v", ""], "neurons": ["d", "u=u", ""]}
SETTINGS: dict[str, Any] = {
    "work": "work",
    "base": "base",
    "tasks": {"own": TASK},
    "architecture": LINKED,
    "experts": {"tasks": ["sst2", "own"]},
    "sources": {"sst2": {"source": "a", "labels": ["a", "b"]}},
    "finetune": {"own": {"device": "cpu", "dtype": "float32"}},
    "data": {"source": "embedded", "revision": "main"},
    "fisher": {"estimator": "empirical", "device": "cpu", "published": "same"},
    "gram": {"own": {"device": "cpu"}},
    "merge": {"method": "average", "mapping": "paper", "coefficient": ["own=1"], "scale": "auto"},
    "calibrate": {"target": "outputs", "device": "cpu"},
    "realign": {"realigned-x": {"device": "cpu"}},
    "baselines": {"other": {"method": "average", "normalise": "none"}},
    "evaluate": {"device": "cpu"},
    "full_fisher": {"estimator": "expected", "device": "cpu"},
    "compare": {
        "study": {
            "sets": ["sst2+own"],
            "split": "train",
            "rows": {"own": 9},
            "methods": {"mine": {"method": "average", "estimator": "empirical"}},
        }
    },
    "registry": {"name": "demo", "experiment": "demo"},
    "notify": {"webhook": "http://127.0.0.1:9/x"},
    "runner": "dask",
    "address": "tcp://host:1",
    "storage": "file:///mnt",
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every text in the settings, and every name that a user chooses (it ends in "name")."""
    if isinstance(value, str):
        yield at
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*at, number))
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in ("own", "sst2", "other", "study", "mine", "realigned-x", "0", "train"):
                yield (*at, name, "name")
            yield from places(item, (*at, name))


def put(place: tuple[Any, ...], text: str) -> dict[str, Any]:
    """The settings with a text in one place."""
    settings = copy.deepcopy(SETTINGS)
    *path, last = place[:-1] if place[-1] == "name" else place
    section: Any = settings
    for part in path:
        section = section[part]
    if place[-1] == "name" and place[:-1] != ("registry",):
        section[text] = section.pop(last)
    else:
        section[last] = text
    return settings


PLACES = [place for place in places(SETTINGS) if place != ("registry", "name")]


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (*texts_in(name), *texts_in(item))
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


@pytest.mark.parametrize(
    "place", [*PLACES, ("registry", "name")], ids=lambda p: ".".join(map(str, p))
)
def test_a_text_is_refused_by_its_place_or_stays_as_it_is(
    place: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("params.yaml")
    for kind, text in HOSTILE.items():
        is_name = place == ("registry", "name")
        content = SETTINGS | {"registry": {"name": text}} if is_name else put(place, text)
        try:
            if kind in ("quotes", "bidi"):  # as it stands in a file, which takes longer to read
                file.write_text(to_yaml(content))
                settings = params.load(file)
            else:
                settings = params.validate(content, "params.yaml:1")
        except UserError as error:
            message = str(error)
            assert message.startswith("params.yaml:"), message
            assert message.isprintable()
            assert str(place[0]) in message or "experts.tasks" in message, (kind, message)
            assert len(message) < 700 + 2 * len(text), message
            continue
        assert kind not in HIDDEN, "a text that hides something was taken"
        if place[0] != "notify":  # a secret
            assert text.strip() in list(texts_in(settings.model_dump(mode="json"))), kind
        check_paths(settings, file, text if place == ("work",) else "work")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def check_paths(settings: params.Params, file: Path, work: str) -> None:
    """Every output of a run, and of a comparison, lies in `work`, and no path is too long."""
    nodes = graph.nodes(settings, file)
    for title, comparing in settings.compare.items():
        nodes += compare.nodes(settings, comparing, file, title)
    root = Path(work)
    for node in nodes:
        if out := node.arguments.get("out"):
            below = out.relative_to(root)
            assert ".." not in below.parts
            assert work == HOSTILE["long"] or max(map(len, below.parts)) < 250
        assert node.title.isprintable()


def test_no_command_of_dvc_holds_more_than_the_name_of_a_task() -> None:
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(graph.dvc_yaml())["stages"]
    for name, stage in stages.items():
        commands = stage.get("do", stage)["cmd"]
        for command in [commands] if isinstance(commands, str) else commands:
            names = {"${item}", "${key}"} if "foreach" in stage else set()
            assert set(command.split()[3:]) <= names
            if names:  # what is not there fails before the command is run: names that fmn checks
                body = stage["do"]
                listed = [*body.get("deps", []), *(p for each in body["params"] for p in each)]
                listed += [key for each in body["params"] for keys in each.values() for key in keys]
                assert any("${item}" in text or "${key}" in text for text in map(str, listed)), name


# ---------------------------------------------------------------------------------------------
# What people read: pages, cards, tables, artifacts


class Shape(HTMLParser):
    """The elements of a page with the names of their attributes; and its texts and values."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.texts += [value or "" for _, value in attrs]

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def task_of(text: str) -> Task:
    return Task(
        name="own",
        problem_type="single_label_classification",
        columns=Columns(text=text, label=f"{text} label"),
        labels=(text, f"{text} 2", f"{text} 3"),
        metrics=("accuracy",),
    )


def report_of(text: str) -> Any:
    task = task_of(text)
    checkpoint = {
        **reports.checkpoint(text), "settings": {text: text}
    }  # fmt: skip
    recipe = {"experts": {"own": checkpoint, "sst2": checkpoint}, "base": checkpoint}
    return reports.report((task, "sst2"), recipe=recipe)


def test_a_page_has_the_same_elements_whatever_its_texts_are() -> None:
    def shape(text: str) -> Shape:
        report = report_of(text)
        pictures = figures.draw(figures.RUN_PICTURES, report)
        html = page.render("report.html", report=report, pictures=pictures)
        words = page.render(
            "registration.html",
            registered=Registered(name="a", version="1", run="1", store="", alias="b", reason=text),
            link=page.registry_page(text, "1"),
            before=None,
            changes=[],
        )
        return Shape(html + words)

    hostile = shape(ALL)
    assert hostile.elements == shape(CLEAN).elements
    assert any(ALL in text for text in hostile.texts), "it can be read as it is"


def test_a_comparison_has_the_same_elements_whatever_its_methods_are_called() -> None:
    def shape(names: list[str]) -> tuple[list[Any], list[Any]]:
        methods = {"base": 0.5, "average": 0.6} | dict.fromkeys(names, 0.7)
        content = comparison.compare(reports.cells({"sst2+cola": ("sst2", "cola")}, methods))
        pictures = figures.draw(figures.COMPARISON_PICTURES, content)
        html = page.render("comparison.html", comparison=content, pictures=pictures)
        table = page.render("table.md", comparison=content, methods="")
        return [e for e in Shape(html).elements if e[0] in SAFE], markdown_shape(table)

    names = [text[:30] for kind, text in HOSTILE.items() if kind not in ("space", *HIDDEN)]
    assert shape(names) == shape([f"{CLEAN} {number}" for number in range(len(names))])


SAFE = ("script", "style", "a", "img", "iframe", "table", "tr", "td", "th", "section", "svg")


def markdown_shape(text: str) -> list[str]:
    """The blocks and inline marks of a Markdown text; of code, that it is there."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shape = []
    for token in reader.parse(text):
        shape.append(token.type)
        shape += [part.type for part in token.children or () if part.type != "text"]
    assert not [name for name in shape if "html" in name and name != "html_inline"]
    return shape


ENTRIES: dict[str, Any] = {"own": {"accuracy": 0.5, "score": 0.5, "examples": 9, "interval": {}}}


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "space"])
def test_markdown_has_the_same_marks_whatever_its_texts_are(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    (model / "tasks/own").mkdir(parents=True)
    current = [CLEAN]  # what the model's outputs are called
    monkeypatch.setattr(version, "output_names", lambda folder: [current[0], f"{current[0]} 2"])
    shown: list[str] = []
    monkeypatch.setattr(pages, "_publish", lambda publish, *arguments: shown.append(arguments[0]))

    def shapes(text: str) -> list[list[str]]:
        task = task_of(text)
        rows = {"own": {"source": text, "revision": text, "splits": {}}}
        metrics = reports.metrics(ENTRIES, [task], data=rows)
        checkpoint = reports.checkpoint(text)
        recipe = reports.recipe(["own"], experts={"own": checkpoint}, base=checkpoint)
        decision = Decision(alias="champion", reason=text)
        nothing = version.Baselines(verdict=(text,))
        tables = ReportInfo(
            header=["task", text], body=[[text, text]], notes=[text], results={}, verdict=[text]
        )
        registered = Registered(
            name="a", version="1", run="1", store="", alias="champion", reason=text
        )
        done = Outcome("fisher", Path("work") / text.replace("/", " "), True, 1.0, None)
        pages.show_summary("params.yaml", tables, registered, [done])
        body = card(recipe, metrics, [text]).split("\n---\n", 1)[1]
        texts = [
            markdown(["a", text], [[text, "b"], ["c", text]]),
            body,
            version.page("models:/a/1", model, recipe, metrics, {"own": task}, nothing, decision,
                         None),
            shown.pop(),
        ]  # fmt: skip
        return [markdown_shape(each) for each in texts]

    clean = shapes(CLEAN)
    current[0] = HOSTILE[kind]
    assert shapes(HOSTILE[kind]) == clean


def test_what_a_comparison_may_be_called(tmp_path: Path) -> None:
    methods = {"mine": {"method": "average"}}
    for name, message in (("a" * 200, "compare"), ("expert", "")):
        content = {"base": "b", "experts": {"tasks": ["sst2"]}, "sources": {"sst2": "a"},
                   "registry": {"name": "a"}}  # fmt: skip
        titles = {name: {"methods": methods}} if message else {"a": {"methods": {name: {}}}}
        with pytest.raises(UserError, match="compare"):
            params.validate(content | {"compare": titles}, "params.yaml")
    assert CompareSettings.model_validate({"methods": {"a/b": {"method": "average"}}})


# ---------------------------------------------------------------------------------------------
# A whole run

TEXT = "<i onclick=x>{0} %s $(touch pwned);`touch pwned` | ${base} {{1+1}} '\"&amp;"
NAMES = [f"{name} {TEXT}" for name in ("good", "bad", "so-so")]


@pytest.mark.slow
def test_a_run_of_hostile_texts_is_one_like_any_other(tiny_base: Path, tmp_path: Path) -> None:
    project = make_own_project(tmp_path / "a 'quoted' $(touch pwned) project", tiny_base)
    rows = [(f"{NAMES[n % 3]} is what {n} wrote", NAMES[n % 3]) for n in range(60)]
    folder, expert = project / "rows $(touch pwned); <i>", project / "models/$(touch pwned) `x` | y"
    folder.mkdir()
    for split in ("first", "second"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([(f"text {TEXT}", f"label {TEXT}"), *rows])
    fine_tune_elsewhere(project / "source", expert, NAMES[::-1], rows)
    settings = read_yaml(project / "params.yaml")
    mood = settings["tasks"]["mood"]
    mood["dataset"]["path"] = folder.name
    mood |= {"columns": {"text": f"text {TEXT}", "label": f"label {TEXT}"}, "labels": NAMES}
    settings["sources"]["mood"] = f"models/{expert.name}"
    settings["work"] = "data/work $(touch pwned); <i> & 'x' {0} %s"
    settings["registry"]["experiment"] = TEXT
    (project / "params.yaml").write_text(to_yaml(settings))

    flow(project)
    assert repro(project) == []
    dvc(project, "repro", "-f", "-s", "data@mood", "fisher@mood", "report")
    read = Shape((project / settings["work"] / "report/report.html").read_text())
    assert not [names for _, names in read.elements if any(n.startswith("on") for n in names)]
    assert [tag for tag, _ in read.elements].count("script") == 1
    assert any(NAMES[0][:31] in text for text in read.texts), "long ones are cut"
    assert not list(tmp_path.rglob("pwned"))

    # What failed is not done, of a stage of several commands too: it fails again.
    settings["realign"] = {"realigned": {"own_layers": 9}}
    (project / "params.yaml").write_text(to_yaml(settings))
    for _ in range(2):
        assert "own_layers is 9" in run(project, "dvc", "repro", "models", fails=True)
    (folder / "first.csv").write_text("none,of these\n1,2\n")
    for _ in range(2):
        assert "no column" in run(project, "dvc", "repro", "data", fails=True)
