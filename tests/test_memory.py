"""The C library's settings: freed memory is used again."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from perdure.memory import M_MMAP_THRESHOLD, VARIABLES, keep_freed_memory

FAULTS = """
import resource, sys, torch
from perdure.memory import keep_freed_memory
if sys.argv[1] == "keep": keep_freed_memory()
for _ in range(16): torch.ones(2**25)  # 128 MB; the first few leave small blocks that glibc keeps for themselves
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8): torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints how many pages the system had to hand out for eight tensors, one after the other."""


def faults(what: str, **variables: str) -> int:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = [sys.executable, "-c", FAULTS, what]
    return int(subprocess.run(run, env=env | variables, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("most", "told"), [(2**30, [-3, -1, -2]), (2**25, [-3, -3, -1, -2]), (0, [-3, -3])])
def test_a_c_library_that_takes_less_is_asked_for_less_or_left_alone(
    monkeypatch: pytest.MonkeyPatch, most: int, told: list[int]
):
    asked: list[int] = []

    def mallopt(name: int, value: int) -> int:
        asked.append(name)
        return int(name != M_MMAP_THRESHOLD or value <= most)

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory()
    assert asked == told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_next_tensor_gets_the_memory_of_the_last_one():
    pages = 8 * 2**27 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages / 20
    assert faults("leave") > pages / 2
    # Who has told the C library what to do is left alone.
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > pages / 2
