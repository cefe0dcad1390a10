"""Wrong inputs: each ends in one line that names what is wrong, what is there, and what to do."""

import io
import json
import os
import shlex
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fmn import cli, terminal
from fmn.store.yaml_file import to_yaml

SETTINGS: dict[str, Any] = {
    "work": "work",
    "base": "base",
    "experts": {"tasks": ["sst2", "mrpc"]},
    "sources": {"sst2": "experts/sst2", "mrpc": "experts/mrpc"},
    "data": {"source": "embedded"},
    "registry": {"name": "demo"},
}
GOOD = to_yaml({name: SETTINGS[name] for name in SETTINGS if name != "work"})
ROWS = "".join(f"good {row},{row % 2}\n" for row in range(20))
TENSOR = "bert.encoder.layer.0.output.dense.weight"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def house(tiny_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run's files, and in `bad` of files that are wrong in one way each."""
    house = tmp_path_factory.mktemp("a house")
    for name in ("base", "experts", "data", "fisher"):
        (house / name).symlink_to(tiny_work / name)
    write(house / "bad/good.yaml", to_yaml(SETTINGS))
    for suffix in ("yaml", "json", "csv", "parquet", "safetensors", "jsonl"):
        write(house / f"bad/empty.{suffix}", "")
        (house / f"bad/folder.{suffix}").mkdir()
    files: dict[str, str | bytes] = {
        "latin.yaml": b"work: a\nbase: caf\xe9\n",
        "latin.csv": b"text,label\ncaf\xe9,1\n",
        "list.yaml": "- a\n- b\n",
        "tabs.yaml": "base: a\n\twork: b\n",
        "half.json": '{"a": ',
        "list.json": "[1]",
        "other.json": '{"a": 1}',
        "rows.csv": f"text,label\n{ROWS}",
        "header.csv": "text,label\n",
        "one class.csv": "text,label\n" + "good,1\n" * 20,
        "ragged.csv": "text,label\na,1\nb,1,2,3\n",
        "twice.csv": "text,text\na,1\nb,2\n",
        "nul.csv": "text,label\na\0b,1\nb,2\n",
        "rows.jsonl": '{"text": "a", "label": 1}\nnot json\n',
        "rows.xlsx": "a workbook",
        "no gzip.csv.gz": "text,label\n",
        "open quote.csv": 'text,label\na,1\n"b,0\n',
        "header twice.csv": f"text,label\n{ROWS}text,label\n",
        "null.jsonl": '{"text": null, "label": 1}\n{"text": "a", "label": 0}\n',
        "documents.yaml": "work: a\n---\nwork: b\n",
        "nul.yaml": "work: a\0b\n",
        "cut.parquet": (house / "data/sst2/train.parquet").read_bytes()[:500],
        "fisher.parquet": (house / "fisher/sst2.parquet").read_bytes()[:300],
        "latin.txt": b"caf\xe9\n",
        "numbers.csv": "text,label\na,1.5\nb,many\n",
        "no labels.csv": "text,label\na,\nb,\n",
        "tags.jsonl": '{"tokens": ["a", "b"], "label": ["O"]}\n' * 2,
        "conll.txt": "a O\nb\n",
        "nested.jsonl": '{"text": {"a": 1}, "label": 1}\n{"text": "b", "label": 0}\n',
        "images/train/cat/0.png": "no picture",
        "images/train/dog/0.png": "no picture",
    }
    for name, content in files.items():
        write(house / "bad" / name, content)
    (house / "bad/nothing inside").mkdir()
    (house / "bad/loop").symlink_to("loop")
    (house / "bad/dangling").symlink_to("nowhere")
    (house / "bad/dangling.csv").symlink_to("nowhere.csv")
    write_checkpoints(house / "experts/sst2", house / "bad")
    shutil.copytree(house / "data/sst2", house / "bad/cut rows")
    os.truncate(house / "bad/cut rows/train.parquet", 500)
    return house


def write_checkpoints(expert: Path, out: Path) -> None:
    """Copies of an expert that are wrong in one way each, which the folder's name tells."""
    weights = (expert / "model.safetensors").read_bytes()
    config = json.loads((expert / "config.json").read_text())
    tensors = safetensors.torch.load(weights)
    without = {name: value for name, value in tensors.items() if name != TENSOR}
    shard = {"weight_map": {TENSOR: "model-00001-of-00002.safetensors"}}
    changes: dict[str, dict[str, str | bytes | None]] = {
        "cut weights": {"model.safetensors": weights[:1000]},
        "no weights": {"model.safetensors": None},
        "text as weights": {"model.safetensors": "hello, hello"},
        "no config": {"config.json": None},
        "half config": {"config.json": '{"model_type": '},
        "list config": {"config.json": "[]"},
        "latin config": {"config.json": b'{"model_type": "caf\xe9"}'},
        "unknown model": {"config.json": json.dumps({**config, "model_type": "florb"})},
        "wider": {"config.json": json.dumps({**config, "hidden_size": 32})},
        "more layers": {"config.json": json.dumps({**config, "num_hidden_layers": 3})},
        "odd heads": {"config.json": json.dumps({**config, "num_attention_heads": 3})},
        "null as size": {"config.json": json.dumps({**config, "hidden_size": None})},
        "unknown activation": {"config.json": json.dumps({**config, "hidden_act": "florb"})},
        "no second label": {"config.json": json.dumps({**config, "id2label": {0: "a", 2: "b"}})},
        "text as size": {"config.json": json.dumps({**config, "hidden_size": "16"})},
        "nan weights": {"model.safetensors": safetensors.torch.save(with_nan(tensors, TENSOR))},
        "nan head": {
            "model.safetensors": safetensors.torch.save(with_nan(tensors, "classifier.bias"))
        },
        "lacks a tensor": {"model.safetensors": safetensors.torch.save(without)},
        "no tokenizer": dict.fromkeys(
            ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
        ),
        "half tokenizer": {"tokenizer.json": "{"},
        "half task": {"task.json": "{"},
        "lacks a shard": {
            "model.safetensors": None,
            "model.safetensors.index.json": json.dumps(shard),
        },
        "bad pickle": {"model.safetensors": None, "pytorch_model.bin": b"\x80\x02rubbish"},
    }
    for name, files in changes.items():
        folder = Path(shutil.copytree(expert, out / name))
        (folder / "fmn.json").unlink()
        for file, content in files.items():
            (folder / file).unlink(missing_ok=True)
            if content is not None:
                write(folder / file, content)


def with_nan(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    """Tensors, of which one holds a NaN."""
    wrong = tensors[name].clone()
    wrong.view(-1)[3 % wrong.numel()] = float("nan")
    return {**tensors, name: wrong}


def mistake(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The one line that a wrong command prints on standard error, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split(command))
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("fmn: ")
    assert printed.err.count("\n") == 1
    check_words(printed.err)
    return printed.err


def check_words(message: str) -> None:
    """What holds of every message: no traceback, no names of Python's, nothing cut or empty."""
    for word in ("Traceback", "Error(", "pydantic", "site-packages", "None", "<class", "object at"):
        assert word not in message, message
    for mark in (": :", "::", "??", "..", " ;", "?."):
        assert mark not in message.replace(", ...", "").replace("...", "").replace("../", ""), (
            message
        )
    assert ".py" not in message, "nobody is to change the package"


OUT = "-o out/x"
DATA = "data own --text text --label label -o out/x"
TUNE = f"finetune base --task sst2 {OUT}"
FISHER = "fisher --task sst2 -o out/x.parquet --data data"
MERGE = f"merge {OUT} --expert"
TWO = f"{MERGE} sst2=experts/sst2 mrpc=experts/mrpc"
SEARCH = "search --expert experts --data data -o out/x.json --method average"
REPORT = f"report {OUT} --merged"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # the settings file
        ("run -p nowhere.yaml", "nowhere.yaml: no such file|--params|fmn init"),
        ("run -p bad/empty.yaml", "bad/empty.yaml: is empty|fmn init"),
        ("run -p bad/latin.yaml", "bad/latin.yaml:2: not UTF-8 (byte 0xe9)|save it as UTF-8"),
        ("run -p bad/folder.yaml", "bad/folder.yaml: Is a directory|--params"),
        ("run -p bad/list.yaml", "bad/list.yaml: must be a section|not ['a', 'b']"),
        ("run -p bad/documents.yaml", "bad/documents.yaml:2: not valid YAML: a second doc|keep"),
        ("run -p bad/nul.yaml", "bad/nul.yaml: not valid YAML|write plain text"),
        ("run -p bad/tabs.yaml", "bad/tabs.yaml:2: not valid YAML|see that"),
        ("run -p bad/rows.csv", "bad/rows.csv: must be a section of settings|good 1,1|..."),
        ("run -p bad/cut.parquet", "bad/cut.parquet:1: not UTF-8"),
        ("run -p bad/loop", "bad/loop: Too many levels of symbolic links|--params"),
        ("run -p bad/dangling", "bad/dangling: a symbolic link to |--params"),
        ("run more", "more: no argument of this command|fmn run --help"),
        ("run --florb", "--florb: no such option|fmn run --help"),
        ("florb", "florb: no such command|fmn --help"),
        ("rum", "did you mean 'run'|fmn --help"),
        ("predict", "MODEL: is missing|fmn predict --help"),
        ("merge --method", "--method: its value is missing|fmn merge --help"),
        ("evaluate experts/sst2 --task own --data no -o m.json", "--data no: no such folder"),
        ("compare study -p nowhere.yaml", "nowhere.yaml|--params"),
        ("stage florb -p bad/good.yaml", "stage florb|fetch-base|register"),
        ("stage settings x -p bad/good.yaml", "stage settings: has no x; it takes no name"),
        ("stage fetch rte -p bad/good.yaml", "stage fetch: has no rte|sst2, mrpc"),
        ("tasks nothing", "task nothing|--dataset|under `tasks:`|cola"),
        ("tasks sst2 --data nowhere", "--data nowhere: no such folder|fmn data"),
        ("init", "EXPERTS"),
        ("init nowhere -o out/x.yaml", "nowhere: no such folder|hf://org/name"),
        ("init experts/sst2 -o bad/good.yaml", "bad/good.yaml: is there already|--force"),
        ("init experts/sst2 -o bad/folder.yaml --force", "bad/folder.yaml: is a folder|--out"),
        ("init 'bad/half config' -o out/x.yaml", "bad/half config/config.json: not JSON|get the"),
        # sources
        (f"fetch nowhere {OUT}", "nowhere: no such folder|hf://org/name"),
        (f"fetch '' {OUT}", "a source is empty|hf://org/name"),
        (f"fetch 'bad/nothing inside' {OUT}", "bad/nothing inside: has no config.json|give the"),
        (f"fetch bad/rows.csv {OUT}", "bad/rows.csv: is a file|give the folder"),
        (f"fetch bad/loop {OUT}", "bad/loop: a symbolic link to loop, which is not there"),
        (f"fetch ftp://a/b {OUT}", "ftp://a/b: not a source|hf://org/name"),
        (f"fetch models:/a/b/c {OUT}", "models:/a/b/c: not a registered version|models:/NAME/VER"),
        (f"fetch models:/a@b {OUT}", "MLflow at sqlite:///mlflow.db: there is no such database"),
        (f"fetch 'bad/null as size' {OUT}", "config.json|hidden_size must be int, not null"),
        (f"fetch 'bad/unknown activation' {OUT}", "config.json|hidden_act is 'florb', which is"),
        (f"fetch 'bad/no second label' {OUT}", "id2label must name the outputs 0, 1, ...|'2': 'b'"),
        (f"fetch experts/sst2 --task rte {OUT}", "experts/sst2: an expert of sst2, not rte|--task"),
        (f"fetch experts/sst2 --task sst2 --data bad/rows.csv {OUT}", "bad/rows.csv: is a file|gi"),
        (f"fetch hf:// {OUT}", "hf://: not a source|hf://org/name"),
        (f"fetch hf://a/../b {OUT}", "hf://a/../b: not a source|hf://org/name"),
        (f"fetch package:no_such/model {OUT}", "package:no_such/model|pip install"),
        (f"fetch package:json/model {OUT}", "package:json/model|no package has json"),
        (f"fetch package:json/../../etc {OUT}", "package:json/../../etc: not a source"),
        (f"fetch 'bad/cut weights' {OUT}", "bad/cut weights/model.safetensors|get it again"),
        (f"fetch 'bad/no weights' {OUT}", "bad/no weights: has neither model.safetensors|save it"),
        (f"fetch 'bad/text as weights' {OUT}", "model.safetensors: not a valid safetensors|again"),
        (f"fetch 'bad/no config' {OUT}", "bad/no config: has no config.json|give"),
        (f"fetch 'bad/half config' {OUT}", "bad/half config/config.json: not JSON|get the file"),
        (f"fetch 'bad/list config' {OUT}", "config.json: not a JSON object|get the file again"),
        (f"fetch 'bad/latin config' {OUT}", "config.json: not JSON|0xe9|get the file again"),
        (f"fetch 'bad/unknown model' {OUT}", "bad/unknown model: config.json|florb|for example"),
        (f"fetch 'bad/nan weights' {OUT}", f"nan weights: |{TENSOR} are NaN or|earlier"),
        (f"fetch bad/wider {OUT}", "word_embeddings.weight is (30522, 16)|32) in config.json"),
        (f"fetch 'bad/more layers' {OUT}", "encoder.layer.2.|is missing|config.json"),
        (f"fetch 'bad/odd heads' {OUT}", "bad/odd heads: config.json|16|attention heads (3)"),
        (f"fetch 'bad/text as size' {OUT}", "bad/text as size/config.json|hidden_size|'16'"),
        (f"fetch 'bad/lacks a tensor' {OUT}", "layer.0.output.dense.weight is missing"),
        (f"fetch 'bad/half tokenizer' {OUT}", "bad/half tokenizer: its tokenizer files|again"),
        (f"fetch 'bad/half task' --task sst2 {OUT}", "bad/half task/task.json: not JSON|fmn data"),
        (f"fetch 'bad/lacks a shard' {OUT}", "model-00001-of-00002.safetensors|get it too"),
        (f"fetch 'bad/bad pickle' {OUT}", "pytorch_model.bin: is damaged|ask its author"),
        ("fetch experts/sst2", "--out"),
        ("fetch experts/sst2 -o experts/sst2", "--out experts/sst2: would change|choose another"),
        ("fetch experts/sst2 -o bad/rows.csv", "--out bad/rows.csv: name a folder"),
        ("fetch experts/sst2 -o bad/rows.csv/x", "bad/rows.csv is a file and no folder|choose"),
        (f"fetch experts/sst2 --task mrpc --data data {OUT}", "mrpc|negative|equivalent|--labels"),
        (f"fetch experts/sst2 --task sst2 --data data --labels a {OUT}", "labels a|negative, pos"),
        # rows
        (f"data sst2 --source nowhere {OUT}", "nowhere"),
        (f"data sst2 --source 'bad/nothing inside' {OUT}", "bad/nothing inside: no validation"),
        (f"data nothing --source embedded {OUT}", "task nothing|--dataset"),
        (f"data ../own --dataset bad/rows.csv {OUT}", "../own|letters, digits"),
        (f"{DATA} --dataset nowhere.csv", "nowhere.csv: no such file|there are"),
        (f"{DATA} --dataset bad/empty.csv", "bad/empty.csv: the file is empty"),
        (f"{DATA} --dataset bad/header.csv", "bad/header.csv: there are no rows"),
        (f"{DATA} --dataset 'bad/one class.csv'", "bad/one class.csv: the label is '1'|labels:"),
        (f"{DATA} --dataset bad/ragged.csv", "bad/ragged.csv: not csv|line 3"),
        (f"{DATA} --dataset bad/twice.csv", "bad/twice.csv: two columns are called 'text'|rename"),
        (f"{DATA} --dataset bad/nul.csv", "bad/nul.csv: column text|row 0|drop the row"),
        (f"{DATA} --dataset bad/latin.csv", "bad/latin.csv: not UTF-8 (byte 0xe9|save it as UTF-8"),
        (f"{DATA} --dataset bad/dangling.csv", "bad/dangling.csv: a symbolic link to nowhere.csv"),
        (f"{DATA} --dataset 'bad/open quote.csv'", "a quote that begins in line 3 is never closed"),
        (f"{DATA} --dataset 'bad/header twice.csv'", "row 20 is the header again; remove it"),
        (f"{DATA} --dataset bad/null.jsonl", "column text is null in row 0, not a text"),
        (f"{DATA} --dataset bad/rows.jsonl", "bad/rows.jsonl: line 2 is not JSON|correct it"),
        (f"{DATA} --dataset bad/empty.jsonl", "bad/empty.jsonl: there are no rows"),
        (f"{DATA} --dataset bad/rows.xlsx", "bad/rows.xlsx: the ending|.csv"),
        (f"{DATA} --dataset bad/cut.parquet", "bad/cut.parquet: not parquet"),
        (f"{DATA} --dataset 'bad/no gzip.csv.gz'", "bad/no gzip.csv.gz: not csv|gzip"),
        (f"{DATA} --dataset bad/folder.parquet", "bad/folder.parquet: no data file|.csv"),
        (f"{DATA} --dataset bad/numbers.csv --problem-type regression", "'many' in row 1|numbers"),
        (f"{DATA} --dataset 'bad/no labels.csv'", "the label is empty in every row|columns.label"),
        (f"data own --dataset bad/tags.jsonl --tokens tokens {OUT}", "row 0 has 2 words and 1"),
        (f"data own --dataset bad/conll.txt --tokens tokens {OUT}", "bad/conll.txt: line 2 is 'b'"),
        (f"{DATA} --dataset bad/nested.jsonl", "column text is {'a': 1} in row 0, not a text"),
        (f"data own --dataset bad/images --image image {OUT}", "row 0 (cat/0.png)|PNG|replace it"),
        (f"{DATA} --dataset bad/rows.csv --validation nowhere.csv", "nowhere.csv: no such file"),
        (f"{DATA} --dataset bad/rows.csv --source hub", "--dataset and --source contradict"),
        (f"{DATA} --dataset http://127.0.0.1:9/x.csv", "127.0.0.1:9/x.csv: not there|network"),
        (f"{DATA} --dataset florb://rows.csv", "florb://rows.csv|florb|give a file"),
        (f"data own --dataset bad/rows.csv --text florb --label label {OUT}", "no column florb"),
        (f"data own --dataset bad/rows.csv --text text --label florb {OUT}", "florb|text, label"),
        (f"{DATA} --dataset bad/rows.csv --metric florb", "metric 'florb'|accuracy"),
        (f"{DATA} --dataset bad/rows.csv --validation-size 1.5", "validation_size|below 1|1.5"),
        (f"{DATA} --dataset bad/rows.csv --validation-size 100", "100 of 20 rows|at most 19"),
        (f"{DATA} --dataset bad/rows.csv --validation-size many", "--validation-size|'many'"),
        (f"{DATA} --dataset bad/rows.csv --labels 0=a 5=b", "column label is 1|0, 5|`labels`"),
        (f"{DATA} --dataset bad/rows.csv --labels a", "bad/rows.csv|labels|0, 1"),
        (f"{DATA} --dataset bad/rows.csv --max-length 0", "--max-length: must be 1 or more"),
        (f"{DATA} --dataset bad/rows.csv --text-pair text", "'text' is named twice"),
        (f"data own --definition nowhere.yaml {OUT}", "nowhere.yaml: no such file|--definition"),
        (f"data own --definition bad/good.yaml {OUT}", "bad/good.yaml: work|no such setting"),
        # experts and statistics
        (f"finetune nowhere --task sst2 --data data {OUT}", "nowhere: no such file|check"),
        (f"{TUNE} --data nowhere", "nowhere/train.parquet: no such file|fmn data sst2|--data"),
        (f"{TUNE} --data 'bad/cut rows'", "bad/cut rows/train.parquet: not Parquet"),
        (f"{TUNE} --data data --epochs 0", "--epochs: must be above 0, not '0'"),
        (f"{TUNE} --data data --epochs nan", "--epochs: must be a finite number, not 'nan'"),
        (f"{TUNE} --data data --examples 0", "--examples: at least one example"),
        (f"{TUNE} --data data --device florb", "device: no device 'florb' here|cuda:N"),
        (f"{TUNE} --data data --dtype float8", "--dtype|'float32'|'float8'|did you mean"),
        (f"finetune 'bad/no tokenizer' --task sst2 --data data {OUT}", "no tokenizer files|copy"),
        (f"{FISHER} experts/stsb", "experts/stsb|score|negative, positive|--labels"),
        (f"{FISHER} 'bad/nan weights'", "sst2: the Fisher information of layer 0 is not finite|fl"),
        (f"{FISHER} base", "base: has no classification head|fmn finetune"),
        (f"{FISHER} experts/sst2 --samples some", "--samples: must be a whole number, not 'some'"),
        (f"{FISHER} experts/sst2 --estimator emp", "--estimator: must be one of|'emp'"),
        (f"{FISHER} 'bad/cut weights'", "bad/cut weights/model.safetensors|get it again"),
        # merges
        (f"{MERGE} nowhere", "--expert nowhere: no such folder|NAME=PATH"),
        (f"{MERGE} experts", "--fisher mrpc=FILE is missing|fmn fisher"),
        (f"{MERGE} experts --method florb", "--method: unknown method 'florb'|average"),
        (f"{MERGE} experts --method regmean", "--gram mrpc=FILE is missing|fmn gram"),
        (f"{MERGE} experts --method ties", "ties|--base DIR"),
        (f"{TWO} --method average --coefficient rte=1", "rte: no such expert|sst2"),
        (f"{TWO} --method average --coefficient sst2", "--coefficient|sst2|NAME=VALUE"),
        (f"{TWO} --method average --coefficient sst2=x", "--coefficient: sst2='x': not a number"),
        (f"{TWO} --method average --coefficient sst2=0 mrpc=0", "--coefficient: all are zero"),
        (f"{TWO} --method average --scale x", "--scale: must be a number, not 'x'"),
        (f"{MERGE} a='bad/nan head' b=experts/mrpc --method average", "classifier.bias holds NaN"),
        (f"{MERGE} ../x=experts/sst2 b=experts/mrpc --method average", "'../x': a task's name is"),
        (f"{TWO} --method average --density 0.5", "density: method average has none; leave it out"),
        (f"{TWO} --method average --coefficient sst2=1 sst2=2", "--coefficient: sst2 is given tw"),
        (f"{MERGE} a=experts/sst2 a=experts/mrpc", "--expert: a is given twice"),
        (f"{TWO} --fisher sst2=bad/fisher.parquet mrpc=fisher/mrpc.parquet",
         "bad/fisher.parquet: not a Fisher artifact|fmn fisher"),
        (f"{TWO} --fisher sst2=fisher/mrpc.parquet mrpc=fisher/mrpc.parquet",
         "fisher/mrpc.parquet: of task mrpc, not sst2|give that of sst2"),
        (f"{MERGE} a=bad/rows.csv b=experts/mrpc --method average", "bad/rows.csv: is a file|give"),
        (f"{MERGE} experts --method auto", "--data DIR is missing: method auto|give it"),
        (f"{MERGE} experts --method average --coefficients bad/other.json", "other.json|fmn se"),
        (f"{TWO} --method ties --base nowhere", "nowhere: no such folder|check the path"),
        (f"{TWO} --method ties --base bad/wider", "base: bad/wider|word_embeddings.weight"),
        (f"realign nowhere --expert experts --data data {OUT}", "nowhere/merge.json|fmn merge"),
        (f"calibrate base --expert experts --data data {OUT}", "base/merge.json: no such|fmn mer"),
        (f"{SEARCH} --trials 0", "--trials: must be 1 or more, not '0'"),
        (f"{SEARCH} --experiment ''", "--experiment: must be a text that is not empty"),
        (f"{SEARCH} --scale-range 2 1", "--scale-range: LOW"),
        # results
        ("evaluate nowhere --data data -o out/x.json", "nowhere"),
        ("evaluate experts/sst2 --data data -o out/x.json", "experts/sst2: not a merged|--task"),
        (f"{REPORT} merged=nowhere.json", "nowhere.json: no such file"),
        (f"{REPORT} merged=bad/half.json", "bad/half.json: not JSON|fmn evaluate"),
        (f"{REPORT} merged=bad/list.json", "bad/list.json|[1]|fmn evaluate"),
        (f"{REPORT} merged=bad/other.json", "bad/other.json|is missing|fmn evaluate"),
        ("predict nowhere text --task sst2", "nowhere: no such folder|models:/"),
        ("predict experts/sst2 text --task sst2", "experts/sst2: not a merged model|models:/"),
        ("register nowhere --metrics x.json --name demo", "nowhere/merge.json|fmn merge"),
        ("register base --metrics x.json --name ../demo", "--name: must be a name|'../demo'"),
        ("register base --metrics x.json --name a --tolerance 2", "--tolerance|at most 1"),
        ("register base --metrics x.json --name a --data nowhere", "nowhere: no such folder"),
        ("rollback a --to x", "rollback a x: give the model's name, and a number to --to"),
        ("register base --metrics x.json --name a --report nowhere", "nowhere/report.html|fmn"),
        ("register base --metrics x.json --name a --card nowhere.md", "nowhere.md: no such|fmn"),
        ("reproduce demo", "demo: not a registered version|models:/NAME/VERSION"),
        ("push base nowhere", "nowhere: not a place on the Hub|hf://ORG/NAME"),
        ("push 'bad/nothing inside' hf://org/x", "bad/nothing inside: is no merged model|--fisher"),
    ],
)  # fmt: skip
def test_a_wrong_command(
    house: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: str,
) -> None:
    monkeypatch.chdir(house)
    message = mistake(capsys, command)
    for word in words.split("|"):
        assert word in message
    assert not list(house.glob("out/[!.]*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": 3}, ":2: base: must be a text|3"),
        ({"base": None}, ":2: base: must be a text, in quotes, not null"),
        ({"work": "."}, ":1: work: '.' is no folder of a run's own|such as data/work"),
        ({"work": "base/x"}, ":1: work: 'base/x' is in base, which is read; name another folder"),
        ({"work": "~/x"}, ":1: work: '~/x' is no folder of a run's own|whole path"),
        (
            {"fisher": {"seed": date(2026, 1, 2)}},
            "fisher.seed: must be a whole number, not 2026-01",
        ),
        ({"tasks": {1: {}}}, "tasks.1: must be a text, in quotes, not 1"),
        ({"work": ""}, ":1: work: must be a text that is not empty"),
        ({"experts": ["sst2"]}, ":3: experts: must be a section|['sst2']"),
        ({"experts": {"tasks": "sst2"}}, "experts.tasks: must be a list|'sst2'"),
        ({"experts": {"tasks": ["sst2", "mrcp"]}}, "'mrcp'|did you mean 'mrpc'"),
        ({"sources": {"sst2": "a"}}, "'mrpc' must be under either `sources` or `finetune`"),
        ({"sources": {"sst2": {"path": "a"}, "mrpc": "b"}}, "sources.sst2.path: unknown|source"),
        ({"sources": "hf://org/name"}, "sources: must be a section|'hf://org/name'"),
        ({"finetune": {"sst2": {"epochs": "two"}}}, "finetune.sst2.epochs: must be a number|'two'"),
        ({"data": {"source": "$NO_SUCH_NAME"}}, "data.source|NO_SUCH_NAME is not set"),
        ({"fisher": {"samples": -1}}, "fisher.samples|at least one example"),
        ({"fisher": {"sample": 9}}, "fisher.sample: unknown setting|did you mean 'samples'"),
        ({"fisher": {"seed": 2**70}}, "fisher.seed|64 bits"),
        ({"fisher": {"dtype": True}}, "fisher.dtype: must be one of|true"),
        ({"merge": {"method": "mean"}}, "merge.method|'mean'|did you mean 'regmean'"),
        ({"merge": {"coefficient": ["sst2=lots"]}}, "merge.coefficient|sst2='lots': not a number"),
        ({"merge": {"coefficient": "sst2=1"}}, "merge.coefficient: must be a list|'sst2=1'"),
        ({"merge": {"scale": "big"}}, "merge.scale|'big'"),
        ({"calibrate": {"texts": 1.5}}, "calibrate.texts: must be a whole number, not 1.5"),
        ({"realign": {"heads": {}}}, "realign: 'heads' must be realigned"),
        ({"baselines": {"merged": {}}}, "baselines: 'merged' is another column's name|choose"),
        ({"baselines": {"a b": {}}}, "baselines: 'a b' must be of letters"),
        ({"evaluate": {"device": 0}}, "evaluate.device: must be a text"),
        ({"compare": {"a": {"methods": {}}}}, "compare.a.methods"),
        ({"compare": {"a": {"sets": ["sst2"], "methods": {"b": {}}}}}, "compare|'sst2'|pairs"),
        ({"registry": {}}, "registry.name: missing; add it"),
        ({"registry": {"name": "a/b"}}, "registry.name: must be a name|'a/b'"),
        ({"registry": {"name": "a", "experiment": ""}}, "registry.experiment: must be a text"),
        ({"registry": {"name": "a", "tolerance": 2}}, "registry.tolerance: must be at most 1|2"),
        ({"notify": {"webhook": 3}}, "notify.webhook: must be a text"),
        (
            {"notify": {"webhook": "ftp://x"}},
            "notify.webhook: must be an address, https://...|$NAME",
        ),
        ({"runner": "ray"}, "runner: must be one of|'ray'"),
        ({"runner": "dask"}, "runner|`address`|tcp://host:8786"),
        ({"florb": 1}, "florb: unknown setting|known here are"),
        ({"tasks": {"own": {"columns": {"text": "a", "label": "a"}}}}, "tasks.own.columns|'a'"),
        ({"tasks": {"own": {"metrics": ["florb"]}}}, "tasks.own|'florb'|accuracy"),
        ({"tasks": {"own": {"labels": ["a", "a"]}}}, "tasks.own|label 'a' is listed twice"),
        ({"tasks": {"own": {"task": "florb"}}}, "tasks.own.task: must be one of|'florb'"),
        ({"tasks": {"own": {"threshold": 2}}}, "tasks.own.threshold: must be below 1, not 2"),
        ({"tasks": {"mean": {}}}, "tasks: 'mean' is what tables call the mean"),
        ({"architecture": {"layers": "a"}}, "architecture"),
    ],
    ids=str,
)
def test_a_wrong_setting(
    house: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(house)
    write(house / "my settings.yaml", to_yaml(SETTINGS | changes))
    message = mistake(capsys, "stage settings -p 'my settings.yaml'")
    assert "my settings.yaml" in message
    for word in words.split("|"):
        assert word in message
    assert not (house / "work").exists()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ("base: café\nfishr: 1\n", "fishr"),
        (f"{GOOD}fisher: {{estimator: größer}}\n", "'gro?er'"),  # what ASCII has of it
        (f"{GOOD}work: \N{SNOWMAN}\nfisher: {{seed: \N{SNOWMAN}}}\n", "fisher.seed|'?'"),
    ],
)
def test_a_stream_of_any_encoding_takes_every_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, shown: str
) -> None:
    write(tmp_path / "réglages.yaml", settings)
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(stream, "ascii", write_through=True))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["run", "-p", "réglages.yaml"])
    message = stream.getvalue().decode("ascii")
    assert "reglages.yaml" in message
    for word in shown.split("|"):
        assert word in message
    assert message.count("\n") == 1


def test_a_name_in_two_lines_is_one_line_of_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = mistake(capsys, "fetch 'a\nb\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}' -o x")
    assert r"a\nb\x1b[31m\u202e: no such folder" in message
    terminal.say("a\x1b[31m\nc")
    assert capsys.readouterr().out == "a\\x1b[31m\nc\n"
