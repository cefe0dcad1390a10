"""Where a task's rows come from."""

from pathlib import Path

from fmn.tasks.task import TaskSettings


def local_files(definition: TaskSettings) -> list[Path]:
    """The local files that a definition reads."""
    dataset = definition.dataset
    if dataset is None:
        return []
    folder, files = Path(dataset.path), dataset.data_files
    if isinstance(files, dict):
        listed = [item if isinstance(item, list) else [item] for item in files.values()]
        return [folder / name for names in listed for name in names]
    return [folder] if folder.is_file() else []
