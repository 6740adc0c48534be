from pathlib import Path

import pytest

from onnx_lathe.runtime import machine
from onnx_lathe.runtime.cgroups import memory_limits


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_file_that_is_not_there_or_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert machine.read(tmp_path / "gone") is None
    assert machine.read(tmp_path) is None
    (tmp_path / "bytes").write_bytes(b" \xff text\n")
    assert machine.read(tmp_path / "bytes") == "\ufffd text"


def test_the_cpu(tmp_path: Path) -> None:
    write(
        tmp_path, {"x86": "model name\t: A CPU\nflags\t: avx2 fma\n\nmodel name\t: A CPU\n", "arm": "Features : i8mm"}
    )
    assert machine.cpu_model(tmp_path / "x86") == "A CPU"
    assert machine.cpu_flags(tmp_path / "x86") == {"avx2", "fma"}
    assert machine.cpu_flags(tmp_path / "arm") == {"i8mm"}
    assert machine.cpu_model(tmp_path / "gone")
    assert machine.cpu_flags(tmp_path / "gone") == frozenset()


@pytest.mark.parametrize(
    ("files", "turbo"),
    [
        ({"cpufreq/boost": "1\n"}, True),
        ({"cpufreq/boost": "0\n"}, False),
        ({"intel_pstate/no_turbo": "0\n"}, True),
        ({"intel_pstate/no_turbo": "1\n"}, False),
        ({}, None),
    ],
)
def test_turbo(tmp_path: Path, files: dict[str, str], turbo: bool | None) -> None:
    assert machine.turbo(write(tmp_path, files)) is turbo


def test_the_governor(tmp_path: Path) -> None:
    assert machine.governor(tmp_path) is None
    assert machine.governor(write(tmp_path, {"cpu0/cpufreq/scaling_governor": "performance\n"})) == "performance"


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/a\n", {"memory.max": "max\n", "a/memory.max": "1000\n"}, [1000]),
        ("0::/a/b\n", {"a/memory.max": "2000", "a/b/memory.max": "1000"}, [1000, 2000]),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "500"}, [500]),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("1:cpu:/\n", {"memory/memory.limit_in_bytes": "500"}, []),
        ("", {}, []),
    ],
)
def test_limits_of_memory(tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]) -> None:
    write(tmp_path / "cgroup", files)
    (tmp_path / "self").write_text(membership)
    assert list(memory_limits(tmp_path / "cgroup", tmp_path / "self")) == limits
