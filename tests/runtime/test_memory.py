"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from onnx_lathe.runtime.memory import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

np.ones(30 << 17)  # freeing 30 MiB: what is smaller comes from the heap from now on
held = [np.ones(1 << 17) for _ in range(100)]
last = np.ones(1 << 10)
before = resident()
del held
if sys.argv[1] == "give back":
    give_back()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc's heap")
def test_what_was_freed_below_something_that_lives_is_given_back() -> None:
    kept, given = (
        int(subprocess.run([sys.executable, "-c", _PROGRAM, what], check=True, capture_output=True, text=True).stdout)
        for what in ("keep", "give back")
    )
    assert kept < given
    assert given > 90 << 20
