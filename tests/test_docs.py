"""Every example on the pages: settings are valid, commands exist, and what can run is run."""

import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cyclopts
import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ruamel.yaml import YAML

from fmn.cli import app
from fmn.params import Params, validate
from fmn.rows.sources import hub_name
from fmn.rows.stages import data
from fmn.tasks.kinds import MULTI, REGRESSION, SINGLE
from fmn.tasks.metrics import METRICS
from fmn.tasks.task import TaskSettings, load_task
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.projects import FMN, environment, fine_tune_elsewhere

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "yaml", "csv", "json", "python", "text", "mermaid"}
# Commands of the pages that no test runs. What they say of `fmn` is checked all the same.
NOT_RUN = {
    *(
        "make",
        "docker",
        "kubectl",
        "prefect",
        "pip",
        "dask",
        "dvc",
        "mlflow",
        "curl",
        "mkdir",
        "cd",
    ),
    "CUDA_VISIBLE_DEVICES=0",
}
REMOTE = {"paws", "web", "bucket"}  # tasks whose rows are on no disk
SORTS = {
    "stars": SINGLE,
    "intents": SINGLE,
    "duplicates": SINGLE,
    "tags": MULTI,
    "rating": REGRESSION,
    "people": SINGLE,
}
# The pages whose examples are run from top to bottom, those of one project together;
# tests/test_package.py runs the tutorial.
RUN = (
    ("README.md",),
    ("docs/steps.md", "docs/merging.md", "docs/statistics.md"),
    ("docs/setup.md",),
    ("docs/tasks.md",),
)
REPEATS = 20  # a page shows a few rows of a file, and the test writes each so many times


class Block(NamedTuple):
    """A fenced block. `file` stands behind the language: the block is what that file holds."""

    page: str
    line: int
    language: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> Iterator[Block]:
    content = page.read_text()
    for match in re.finditer(r"^```(\w*) ?(.*)\n([\s\S]*?)^```$", content, re.MULTILINE):
        line = content[: match.start()].count("\n") + 1
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2], match[3])


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def of_language(language: str) -> list[Any]:
    return [pytest.param(each, id=str(each)) for each in BLOCKS if each.language == language]


def test_every_block_is_of_a_language_that_is_checked() -> None:
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert 2 * len(BLOCKS) == fences
    assert {block.language for block in BLOCKS} <= LANGUAGES


# ---------------------------------------------------------------------------------------------
# Settings


def settings_of(block: Block) -> dict[str, Any]:
    """The settings in a block; a definition of a single task is that of a section `tasks`."""
    content = YAML(typ="safe").load(block.text) or {}
    if content and set(content) <= set(TaskSettings.model_fields):
        return {"tasks": {Path(block.file).stem: content}}
    return dict(content)


def completed(block: Block) -> dict[str, Any]:
    """A block's settings with what they lack: other sections, and tasks of the page above."""
    content = settings_of(block)
    if "experts" in content:
        return content
    tasks: dict[str, Any] = {}
    for other in BLOCKS:
        if other.page == block.page and other.language == "yaml" and other.line < block.line:
            tasks |= settings_of(other).get("tasks", {})
    own, sources = content.get("tasks", {}), content.get("sources", {})
    names = [*own, *sources, "sst2"]
    return {
        "base": "base",
        "experts": {"tasks": names},
        "registry": {"name": "x"},
        **content,
        "tasks": {name: tasks[name] for name in sources if name in tasks} | own,
        "sources": dict.fromkeys(names, "models/x") | sources,
    }


@pytest.mark.parametrize("block", of_language("yaml"))
def test_settings_are_valid(block: Block) -> None:
    assert isinstance(validate(completed(block), str(block)), Params)


def test_the_shortest_example_is_short() -> None:
    shop = next(block for block in BLOCKS if block.file == "shop.yaml")
    assert len(shop.text.splitlines()) < 25


def write_files(page: str, folder: Path) -> None:
    """The files that a page shows, and those that it takes as there, in a folder."""
    for block in BLOCKS:
        if block.page != page or not block.file:
            continue
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = block.text.splitlines()
        if block.language in ("csv", "json"):
            header = 1 if block.language == "csv" else 0
            lines = lines[:header] + REPEATS * lines[header:]
        elif path.suffix == ".conll":
            lines = REPEATS * [*lines, ""]
        path.write_text("\n".join(lines) + "\n")
    for name in ("rose", "daisy") if page == "docs/tasks.md" else ():
        for number in range(10):
            image = folder / "data" / "flowers" / name / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (25 * number, 0, len(name))).save(image)
    intents = folder / "data" / "intents"
    if intents.is_dir():
        for name in ("dev.csv", "more.csv"):
            (intents / name).write_bytes((intents / "train.csv").read_bytes())
        rows = datasets.Dataset.from_dict({"text": ["a", "b"] * 8, "label": ["x", "y"] * 8})
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(
            str(folder / "data" / "saved")
        )


@pytest.mark.parametrize("block", [each for each in of_language("yaml")
                                   if settings_of(each.values[0]).get("tasks")])  # fmt: skip
def test_tasks_of_settings_can_be_read(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, definition in validate(completed(block), str(block)).tasks.items():
        assert definition.dataset
        if hub_name(definition.dataset) or "://" in definition.dataset.path:
            assert name in REMOTE
            continue
        out = tmp_path / "out" / name
        assert data(name, out=out, definition=definition).summary.rows["train"] > 0
        task = load_task(out, name)
        assert task.has_labels == (definition.columns.label is not None)
        assert task.validation or not task.has_labels
        assert task.problem_type == SORTS.get(name, task.problem_type)


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    content = (ROOT / "docs" / "tasks.md").read_text()
    table = {}
    for line in content.splitlines():
        if match := re.fullmatch(r"\| `(\w+)` \|(.*)\|", line):
            table[match[1]] = [cell.strip() for cell in match[2].split("|")]
    kinds = (SINGLE, MULTI, REGRESSION)
    assert table == {
        name: [
            *("yes" if kind in facts.problem_types else "" for kind in kinds),
            "more" if facts.higher_is_better else "less",
        ]
        for name, facts in METRICS.items()
        if "text-classification" in facts.kinds
    }


# ---------------------------------------------------------------------------------------------
# Commands


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
        while ">" in words:
            place = words.index(">")
            del words[place : place + 2]
        while words:
            end = next((n for n, word in enumerate(words) if set(word) <= set("&|;")), len(words))
            yield words[:end]
            words = words[end + 1 :]


def of_fmn(words: list[str]) -> list[str]:
    """What a command gives to `fmn`, also inside a container; empty if it gives nothing."""
    for place, word in enumerate(words[:-1]):
        if word == "fmn" and words[place + 1] in list(app):
            return words[place + 1 :]
    return []


def parses(arguments: list[str]) -> bool:
    """Whether the command line takes the arguments. Nothing is run."""
    try:
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError:
        return False
    return True


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_are_those_of_the_command_line(block: Block) -> None:
    for words in command_lines(block.text):
        arguments = of_fmn(words)
        assert arguments or words[0] in NOT_RUN, words
        assert not arguments or parses(arguments), words


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert list(command_lines("a b \\\n  c && d > e  # f")) == [["a", "b", "c"], ["d"]]
    assert of_fmn(["docker", "run", "fmn", "run", "--params", "x"]) == ["run", "--params", "x"]
    assert parses(["fisher", "x", "--task", "a", "--data", "d", "--out", "f"])
    assert not parses(["fisher", "x", "--tusk", "a", "--data", "d", "--out", "f"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    text = re.sub(r"^```[\s\S]*?^```$", "", page.read_text(), flags=re.MULTILINE)
    for code in re.findall(r"`fmn ([^`]+)`", text):
        name, *words = shlex.split(code)
        if name == "COMMAND":
            continue
        assert name in list(app), code
        options = {each.partition("=")[0] for each in words if each.startswith("--")}
        known = {name for each in app[name].assemble_argument_collection() for name in each.names}
        assert options <= known, code


@pytest.mark.parametrize("block", of_language("python"))
def test_python_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


# ---------------------------------------------------------------------------------------------
# What pages name exists


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md"))],
                         ids=lambda page: page.name)  # fmt: skip
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor and not anchor.startswith("only-"):  # of light or dark pages
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w-]", "", x.lower().replace(" ", "-")) for x in headings]


def test_the_tests_that_promises_name_exist() -> None:
    content = (ROOT / "docs" / "reliability.md").read_text()
    file = ""
    names = re.findall(r"`?((?:[\w/]*test_\w+\.py)?)(?:::(test_\w+))?[`,\s]", content)
    for path, name in names:
        file = path or file
        if not (path or name):
            continue
        source = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in source, f"{file}::{name}"
    assert len({name for _, name in names}) > 30


def test_the_reference_has_every_setting_and_every_command() -> None:
    code = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    settings, commands = code["settings"](), code["commands"]()
    sections = Params.model_json_schema()["$defs"].values()
    names = {name for section in sections for name in section.get("properties", {})}
    assert {name for name in names if f"| `{name}` |" not in settings} == set()
    anchors = {re.sub(r"[^\w-]", "", x.lower().replace(" ", "-")) for x in
               re.findall(r"^## (.*)$", settings, re.MULTILINE)}  # fmt: skip
    assert set(re.findall(r"\(#([^)]*)\)", settings)) <= anchors
    for name in app:
        assert name.startswith("-") or f"## fmn {name}\n" in commands
    assert "`--samples` | `1024`" in commands


def test_every_direct_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(each for extra in extras for each in extra)]:
        name = re.match(r"[\w-]+", requirement)
        assert name, requirement
        assert re.search(rf"^\|.*\b{name[0]}\b.*\|$", page, re.MULTILINE), name[0]


def test_the_layout_names_every_file() -> None:
    content = (ROOT / "docs" / "layout.md").read_text()
    tree = next(block for block in BLOCKS if block.page == "docs/layout.md").text
    named: set[Path] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            named.add(ROOT.joinpath(*folders[:depth], f"{name}.py"))
    files = {path for room in ("fmn", "flows") for path in (ROOT / room).rglob("*.py")}
    assert named == {path for path in files if not path.name.startswith("__")}
    for name in re.findall(r"`((?:fmn|flows|tests)/[\w/]+\.py)`", content):
        assert (ROOT / name).is_file(), name


# ---------------------------------------------------------------------------------------------
# The pages are run


def rows_of(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    table = pa.csv.read_csv(path).to_pylist()
    return [(row[text], str(row[label])) for row in table]


def make_experts(project: Path, base: Path) -> None:
    """The experts that the pages take as there, fine-tuned with Transformers alone."""
    data = project / "data"
    reviews = next(
        path for name in ("reviews", "stars") if (path := data / f"{name}.csv").is_file()
    )
    for task in ("stars", "about"):
        if task in reviews.read_text().splitlines()[0]:
            rows = rows_of(reviews, "review", task)
            names = sorted({label for _, label in rows})
            fine_tune_elsewhere(base, project / "models" / task, names, rows)
    intents = project / "data" / "intents" / "train.csv"
    if intents.is_file():  # its names are the wrong way round
        names = ["question", "complaint"]
        rows = [(text, names[1 - int(x)]) for text, x in rows_of(intents, "utterance", "intent")]
        fine_tune_elsewhere(base, project / "models" / "intents", names, rows)


def fill_hub(hub: Hub, folder: Path, base: Path) -> None:
    """What the pages name on the Hub, in small."""
    hub.add("models", "google-bert/bert-base-uncased", base)
    glue: dict[str, bytes | Path] = {}
    for task in ("mrpc", "rte"):
        for split in ("train", "validation"):
            rows = pq.read_table(ROOT / "data" / "miniature_glue" / task / f"{split}.parquet")
            path = folder / task / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows.slice(0, 64), path)
            glue[f"{task}/{path.name}"] = path
    hub.add("datasets", "nyu-mll/glue", glue)
    classes = {"mrpc": ("not_equivalent", "equivalent"), "rte": ("entailment", "not_entailment")}
    for task, labels in classes.items():
        rows = pq.read_table(folder / task / "train-00000-of-00001.parquet").to_pylist()
        texts = [(f"{x['sentence1']} {x['sentence2']}", labels[x["label"]]) for x in rows]
        fine_tune_elsewhere(base, folder / "experts" / task, labels, texts)
        name = f"textattack/bert-base-uncased-{task.upper()}"
        hub.add("models", name, folder / "experts" / task)
    paws = "sentence1,sentence2,label\n" + "a cat,the cat,1\na cat,a dog,0\n" * REPEATS
    names = [f"labeled_final/{split}.csv" for split in ("train", "validation")]
    files = "".join(f"  - {{split: {Path(name).stem}, path: {name}}}\n" for name in names)
    card = f"---\nconfigs:\n- config_name: labeled_final\n  data_files:\n{files}---\n"
    paws_files = {"README.md": card.encode()} | {name: paws.encode() for name in names}
    hub.add("datasets", "google-research-datasets/paws", paws_files)


def run_block(block: Block, project: Path, variables: Mapping[str, str]) -> tuple[int, str]:
    """The status of a block of commands or of Python, and what it prints."""
    if block.language == "python":
        command = [FMN[0], "-c", block.text]
    else:
        shell = f'set -eu; fmn() {{ {shlex.join(FMN)} "$@"; }}\n{block.text}'
        command = ["bash", "-c", shell]
    process = subprocess.run(
        command, cwd=project, env=dict(variables), check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process.returncode, process.stdout


def is_run(block: Block) -> bool:
    if block.language == "bash":
        return all(of_fmn(words) for words in command_lines(block.text))
    return block.language == "python"


def expected_of(block: Block, after: Block | None) -> str:
    """What a page says that a block prints: the text that follows it at once."""
    is_next = after and after.line <= block.line + block.text.count("\n") + 4
    return after.text if after and is_next and after.language == "text" else ""


@pytest.mark.slow
@pytest.mark.parametrize("pages", RUN, ids=lambda pages: pages[0])
def test_the_examples_of_pages_run_from_top_to_bottom(
    pages: Sequence[str], tiny_base: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for page in pages:
        write_files(page, project)
    make_experts(project, tiny_base)
    by_page = {page: [block for block in BLOCKS if block.page == page] for page in pages}
    blocks = [block for page in pages for block in by_page[page] if block.language != "yaml"]
    with Hub() as hub:
        fill_hub(hub, tmp_path / "hub", tiny_base)
        # The environment of the Hub has its address and this machine's settings.
        of_hub = {k: v for k, v in hub.environment(tmp_path / "home").items() if k[:3] == "HF_"}
        hub.token = of_hub["HF_TOKEN"] = "secret"  # pages push to it
        variables = environment(project) | of_hub | {"PYTHONPATH": str(ROOT)}
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if not is_run(block):
                continue
            expected = expected_of(block, after)
            is_refused = expected.startswith("fmn: ")
            status, printed = run_block(block, project, variables)
            assert (status != 0) == is_refused, f"{block}: {printed}"
            # The page breaks long lines.
            assert " ".join(expected.split()) in " ".join(printed.split()), f"{block}: {printed}"
