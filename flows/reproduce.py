"""A registered version made again: the pipeline on the version's own settings, with nothing registered."""

import os
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import workers
from flows.pages import server_answers
from flows.pipeline import Layout, collect, submit_stages
from fmn import params


@flow(
    name="fmn-reproduce",
    flow_run_name="{profile}",
    task_runner=ThreadPoolTaskRunner(max_workers=workers.count()),  # type: ignore[arg-type]
)
def reproduce(profile: str) -> None:
    """Make everything that a settings file asks for, and register nothing.

    Raises:
        UserError: naming every stage that failed, and why; what finished is kept.
    """
    settings = params.load(Path(profile))
    collect(submit_stages(settings, Layout(Path(settings.work)), None))


def rebuild(profile: Path, name: str, threads: int | None) -> tuple[Path, Path]:
    """Run the flow; what `fmn reproduce --run` does. Returns the merged model and its metrics.

    Args:
        profile: the settings file.
        name: of the merged model.
        threads: of each stage's process, on which the last bits depend; the usual number where it is not known.
    """
    if threads is not None:
        os.environ["FMN_THREADS"] = str(threads)
    with server_answers():
        reproduce(str(profile))
    layout = Layout(Path(params.load(profile).work))
    return layout.merged(name), layout.metrics(name)
