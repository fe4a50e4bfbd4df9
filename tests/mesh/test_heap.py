"""Freed memory stays in the process: the kernel hands out no page twice."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from stretto.mesh.heap import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * (64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
print(faults(), faults())
"""


def first_and_second(**more: str) -> list[int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", FAULTS]
    told = subprocess.run(
        run, env={**environment, **more}, capture_output=True, text=True, check=True
    )
    return [int(word) for word in told.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_a_block_that_was_freed_is_taken_again_without_the_kernel():
    first, second = first_and_second()
    assert second < first / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_a_setting_of_the_environment_stands():
    first, second = first_and_second(MALLOC_MMAP_THRESHOLD_="1048576")
    assert second > first / 2
