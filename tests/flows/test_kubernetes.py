"""The files for Kubernetes: Prefect takes the work pool's template, and what they name is there."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "kubernetes"
TEMPLATE = FOLDER / "job-template.json"


def test_every_place_in_the_template_has_a_variable_and_every_variable_a_place() -> None:
    template = json.loads(TEMPLATE.read_text())
    places = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert places == set(template["variables"]["properties"])


def test_the_pods_user_is_the_images() -> None:
    template = json.loads(TEMPLATE.read_text())
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert f"--uid {pod['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
    assert f"WORKDIR {pod['containers'][0]['workingDir']}" in (ROOT / "Dockerfile").read_text()


@pytest.mark.usefixtures("prefect_server")
def test_prefect_makes_a_work_pool_of_it() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    template = json.loads(TEMPLATE.read_text())
    with get_client(sync_client=True) as client:
        pool = client.create_work_pool(
            WorkPoolCreate(name="fmn-kubernetes", type="kubernetes", base_job_template=template)
        )
    assert pool.base_job_template == template


def test_the_deployments_flows_are_in_the_package() -> None:
    for deployment in YAML(typ="safe").load(FOLDER / "prefect.yaml")["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        inspect.signature(flow.fn).bind(**deployment["parameters"])


def test_the_clusters_parts_find_one_another() -> None:
    parts = {
        part["metadata"]["name"]: part
        for part in YAML(typ="safe").load_all(Path(FOLDER / "dask.yaml"))
    }
    labels = parts["dask-scheduler"]["spec"]["template"]["metadata"]["labels"]
    assert parts["dask"]["spec"]["selector"] == labels
    (worker,) = parts["dask-worker"]["spec"]["template"]["spec"]["containers"]
    (port,) = parts["dask"]["spec"]["ports"]
    assert f"tcp://dask:{port['port']}" in worker["command"]
