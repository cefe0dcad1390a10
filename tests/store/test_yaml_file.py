"""Settings as YAML: plain data alone."""

import re
from pathlib import Path

import pytest

from fmn.errors import UserError
from fmn.store.yaml_file import read_yaml, to_yaml


def test_plain_data_come_back(tmp_path: Path) -> None:
    content = {"work": "a: b", "experts": {"tasks": ["sst2"]}, "rate": 1e-5, "on": True}
    path = tmp_path / "params.yaml"
    path.write_text(to_yaml(content))
    assert read_yaml(path) == content


@pytest.mark.parametrize(
    "text",
    ["a: &x 1\nb: *x", "a: !!python/object:os.system 1", "a: 1\na: 2", "a: [1", "a: " + "[" * 50],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    assert re.match(rf"{path}:\d+: ", str(refused.value))
    assert "\n" not in str(refused.value)
