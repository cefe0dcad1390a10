"""The files for Kubernetes: Prefect takes the work pool's template, and what they name is there."""

import json

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "kubernetes"
TEMPLATE = json.loads((FOLDER / "job-template.json").read_text())


def test_the_pods_user_is_the_images() -> None:
    pod = TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    image = (ROOT / "Dockerfile").read_text()
    assert f"--uid {pod['securityContext']['runAsUser']}" in image
    assert f"WORKDIR {pod['containers'][0]['workingDir']}" in image


@pytest.mark.usefixtures("prefect_server")
def test_prefect_makes_a_work_pool_of_the_template() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    pool = WorkPoolCreate(name="fmn-kubernetes", type="kubernetes", base_job_template=TEMPLATE)
    with get_client(sync_client=True) as client:
        assert client.create_work_pool(pool).base_job_template == TEMPLATE


def test_the_clusters_parts_find_one_another() -> None:
    listed = YAML(typ="safe").load_all(FOLDER / "dask.yaml")
    parts = {part["metadata"]["name"]: part["spec"] for part in listed}
    scheduler, worker = (parts[name]["template"] for name in ("dask-scheduler", "dask-worker"))
    assert parts["dask"]["selector"] == scheduler["metadata"]["labels"]
    port = parts["dask"]["ports"][0]["port"]
    assert f"tcp://dask:{port}" in worker["spec"]["containers"][0]["command"]
