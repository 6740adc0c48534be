import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import DependencyError, ProviderError


def test_names_go_both_ways() -> None:
    assert providers.user_name("CUDAExecutionProvider") == "cuda"
    assert providers.user_name("OpenVINOExecutionProvider") == "openvino"
    assert "cpu" in providers.available()
    assert providers.resolve(None) == "CPUExecutionProvider"
    assert providers.resolve("cpu") == providers.resolve("CPU") == providers.resolve("CPUExecutionProvider")


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("tensorrt", r'Run: pip uninstall -y onnxruntime-openvino, then: pip install "onnx-lathe\[cuda\]"'),
        ("cpuu", "Did you mean 'cpu'"),
        ("abacus", "Name one of these"),
    ],
)
def test_a_provider_that_is_not_there_names_those_that_are(
    monkeypatch: pytest.MonkeyPatch, name: str, mend: str
) -> None:
    build = types.SimpleNamespace(get_available_providers=lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(providers, "onnxruntime", lambda: build)
    monkeypatch.setattr(providers, "_installed", lambda: ["onnxruntime-openvino"])
    with pytest.raises(
        ProviderError, match=rf"provider '{name}': got .* does not have, expected one of openvino, cpu. {mend}"
    ):
        providers.resolve(name)


def fresh() -> Any:
    return providers.onnxruntime.__wrapped__()


def test_two_builds_in_one_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_installed", lambda: ["onnxruntime", "onnxruntime-gpu"])
    with pytest.raises(
        DependencyError,
        match=r"got onnxruntime and onnxruntime-gpu in one environment, .*expected one of them. "
        r"Run: pip uninstall -y onnxruntime onnxruntime-gpu, then: pip install \"onnx-lathe\[cpu\]\"",
    ):
        fresh()


def test_no_build_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        DependencyError, match=r"got no onnxruntime in this environment.*pip install \"onnx-lathe\[cpu\]\""
    ):
        fresh()


def test_the_remains_of_a_build_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(DependencyError, match="got the remains of an onnxruntime"):
        fresh()


def test_a_build_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(DependencyError, match=r"got an onnxruntime that does not load \(libcudart.so.12"):
        fresh()


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/m.onnx failed:/src/core/graph/model.cc:256 "
            "ns::Model::Model(onnx::ModelProto&&, const ns::Options&) Unsupported model IR version: 99\n",
            "Unsupported model IR version: 99",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'' "
            "Status Message: /src/reshape_helper.h:91 ns::Helper::Helper(const ns::Shape&, bool) const "
            "The input tensor cannot be reshaped.",
            "Non-zero status code returned while running Reshape node. Name:'' Status Message: "
            "The input tensor cannot be reshaped",
        ),
        ("word " * 100, "word " * 60 + "..."),
    ],
)
def test_messages_of_onnxruntime_lose_what_no_user_needs(raw: str, clean: str) -> None:
    assert providers.clean_message(RuntimeError(raw)) == clean


def cgroup(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cgroup" / name).write_text(text)
    (root / "self").write_text(membership)
    return root / "cgroup", root / "self"


def version_1(folder: str, quota: str) -> dict[str, str]:
    return {f"cpu,cpuacct/{folder}cpu.cfs_quota_us": quota, f"cpu,cpuacct/{folder}cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("membership", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/not/here\n", {"cpu.max": "500000 100000"}, 5),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n", version_1("x/", "150000"), 2),
        ("3:cpu,cpuacct:/x\n", version_1("x/", "-1"), 16),
        ("3:cpu,cpuacct:/docker/1\n", version_1("", "300000"), 3),
        ("9:cpuset:/\n", {"cpu.max": "100000 100000"}, 16),
        ("", {}, 16),
    ],
)
def test_threads_follow_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert providers.default_threads(*cgroup(tmp_path, membership, files)) == threads


def test_threads_follow_the_allowed_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7}, raising=False)
    assert providers.default_threads(*cgroup(tmp_path, "0::/\n", {"cpu.max": "800000 100000"})) == 2
    assert providers.default_threads(tmp_path / "none", tmp_path / "none") == 2
    assert providers.default_threads() in (1, 2)


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        ("flags\t\t: sse4_2 avx2 avx512f avx512_vnni avx_vnni\n", "avx512-vnni"),
        ("flags\t\t: avx2 avx512f avx512_vnni amx_tile amx_int8\n", "amx-int8"),
        ("flags\t\t: avx2 avx_vnni\n", "avx-vnni"),
        ("flags\t\t: avx2 avx512f\n", "avx512"),
        ("flags\t\t: avx avx2\nflags\t\t: avx avx2\n", "avx2"),
        ("Features\t: fp asimd asimddp i8mm\n", "i8mm"),
        ("Features\t: fp asimd asimddp\n", "dotprod"),
        ("model name\t: something\n", "baseline"),
    ],
)
def test_a_cpu_class_is_the_best_integer_instructions(tmp_path: Path, text: str, kernels: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert providers.cpu_class(tmp_path / "cpuinfo").endswith(f" {kernels}")
    assert providers.cpu_class(tmp_path / "absent").endswith(" baseline")
