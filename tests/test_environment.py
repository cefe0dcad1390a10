"""The environment of the libraries below fmn."""

import os
import resource
import subprocess
import sys

import pytest

from fmn.environment import ENVIRONMENT, settle_environment


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    settle_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["DO_NOT_TRACK"] == "true"


def test_freed_memory_is_used_again_without_new_pages() -> None:
    code = """
import resource, sys, torch
from fmn.environment import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
faults = []
for _ in range(40):
    torch.ones(2**24)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""
    returned, reused = (
        int(subprocess.check_output([sys.executable, "-c", code, *option]))
        for option in ([], ["keep"])
    )
    if returned < 10 * 2**26 // resource.getpagesize():
        pytest.skip("the kernel has huge pages, or this C library keeps freed memory by itself")
    assert reused < returned / 2
