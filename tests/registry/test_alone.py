"""A logged model answers in a process of its own, in which there is no fmn."""

import re
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from fmn.errors import UserError
from fmn.evaluate.files import read_metrics
from fmn.registry import tracking
from fmn.registry.check import alone, check_served
from fmn.tasks.task import get_task
from tests.conftest import TASKS
from tests.registry.conftest import Merged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow")

DEFINITIONS = {name: get_task(name) for name in TASKS}
SERVED = """
import mlflow, os
import pandas as pd

{before}

class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        print("this is no answer")
        if params["task"] == "die":
            os._exit(3)
        return pd.DataFrame({{"label": [str(os.getpid())], "params": [sorted(params)]}})

mlflow.models.set_model(Model())
"""


def logged(folder: Path, before: str = "") -> str:
    """The address of a logged model of a few lines."""
    file = folder / "served.py"
    file.write_text(SERVED.format(before=before))
    parameters = {"task": "a"}
    signature = mlflow.models.ModelSignature(
        params=mlflow.models.infer_signature({"a": [1]}, params=parameters).params
    )
    mlflow.set_experiment("alone")
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name="model", python_model=str(file), signature=signature, pip_requirements=[]
        )
    return str(info.model_uri)


def test_a_model_answers_in_a_process_of_its_own_as_it_was_evaluated(
    store: str, merged: Merged, tiny_work: Path
) -> None:
    with tracking.connection(), alone() as load:
        mlflow.set_experiment("alone")  # another test may have left one of another store
        with mlflow.start_run():
            info = tracking.log_served_model(merged.model, DEFINITIONS)
        serve = load(info.model_uri, store)
        metrics = read_metrics(merged.metrics)
        check_served(serve, merged.model, merged.metrics, metrics, DEFINITIONS, tiny_work / "data")
        with pytest.raises(UserError, match=r"fails: MlflowException: .*task 'other' is not one"):
            serve(pd.DataFrame({"text": ["a"]}), "other")


def test_a_model_that_needs_fmn_or_ends_is_refused(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.DataFrame({"text": ["a"]})
    with alone() as load:
        serve = load(logged(tmp_path), store)
        answer = serve(rows, "mood")
        assert int(answer["label"][0]) > 0
        assert answer["params"][0] == ["task"]
        with pytest.raises(UserError, match=r"fails: it ended \(3\)"):
            serve(rows, "die")
        uri = logged(tmp_path, before="if os.environ.get('ALONE'): import fmn")
    monkeypatch.setenv("ALONE", "1")
    with alone() as load, pytest.raises(UserError) as failure:
        load(uri, store)
    assert re.search(r"fails: .*fmn.*; see that .* Nothing was registered", str(failure.value))
