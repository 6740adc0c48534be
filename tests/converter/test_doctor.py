"""What `lathe doctor` says of machines that are as they should be, and of strange ones."""

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from onnx_lathe.converter import doctor as doctoring
from onnx_lathe.converter.cli import main as cli
from onnx_lathe.converter.diagnosis import accelerators, hardware, software
from onnx_lathe.converter.diagnosis.check import Check, ask
from onnx_lathe.converter.doctor import Diagnosis, table
from onnx_lathe.runtime import cgroups, machine
from onnx_lathe.runtime.errors import DependencyError

Memory = namedtuple("Memory", "total available")
BUILD = {"version": "9.9", "providers": ["cpu"], "cuda": ""}
CPU = {"placement": {"cpu": 2}, "correct": True}


def named(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_is_usable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lathe", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert ended.value.code == 0
    assert (result["schema"], result["usable"]) == ("onnx-lathe/doctor/1", True)
    states = {check["name"]: check["state"] for check in result["checks"]}
    assert states["onnxruntime"] == states["provider cpu"] == states["packages"] == "ok"
    assert {"CPU", "cores", "memory", "clock", "load", "GPU", "torch", "extra serve"} <= states.keys()
    assert "provider cpu" in printed.err


def test_a_problem_is_exit_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Diagnosis((Check("onnxruntime", "problem", "none [here]", "Install it."),), {})
    monkeypatch.setattr(doctoring, "doctor", lambda: found)
    monkeypatch.setattr(sys, "argv", ["lathe", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(printed.out.splitlines()[-1])["usable"] is False
    assert "none [here]" in printed.err


def test_a_table_shows_each_check() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table(Diagnosis((Check("CPU", "note", "[odd]", "Look."),), {})))
    text = console.export_text()
    assert all(part in text for part in ("CPU", "note", "[odd]", "Look."))


@pytest.mark.parametrize(
    ("flags", "state", "says"),
    [
        ({"avx2", "avx512_vnni"}, "ok", "INT8 pays"),
        ({"avx2"}, "note", "quantized to 7 bits"),
        ({"sse4_2"}, "note", "hardly time"),
        (set[str](), "note", "no flags known"),
    ],
)
def test_what_follows_from_the_cpu(monkeypatch: pytest.MonkeyPatch, flags: set[str], state: str, says: str) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda *_: frozenset(flags))
    check = hardware._cpu()
    assert check.state == state
    assert says in check.found


def test_a_quota_under_the_allowed_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda: list(range(8)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(hardware, "default_threads", lambda: 3)
    monkeypatch.setattr(cgroups, "cpu_limits", lambda: iter([4.0, 2.5]))
    check = hardware._cores()
    assert check.state == "warning"
    assert "the cgroup's quota is 2.5 CPUs" in check.found
    assert "intra_op_num_threads to 3" in check.mend
    monkeypatch.setattr(cgroups, "cpu_limits", lambda: iter([]))
    assert hardware._cores().state == "ok"
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    assert (hardware._cores().state, hardware._cores().mend) == ("note", "Try --threads 4.")


@pytest.mark.parametrize(
    ("available", "limits", "state"), [(30, [], "ok"), (1, [], "warning"), (30, [1], "warning"), (30, [16, 64], "note")]
)
def test_memory_and_its_limit(monkeypatch: pytest.MonkeyPatch, available: int, limits: list[int], state: str) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(32 * 2**30, available * 2**30))
    monkeypatch.setattr(cgroups, "memory_limits", lambda: iter(limit * 2**30 for limit in limits))
    assert hardware._memory().state == state


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "read", lambda file: None)
    monkeypatch.setattr(cgroups, "read", lambda file: None)
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    found = named(hardware.checks())
    assert "unknown physical" in found["cores"].found
    assert found["clock"].found == "governor unknown, turbo unknown, no hypervisor seen"
    assert (found["load"].state, found["load"].found) == ("note", "unknown here")


def test_a_folder_that_is_gone_or_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = hardware._disk("working folder", tmp_path / "gone")
    assert (gone.state, "No such file" in gone.found) == ("warning", True)
    assert hardware._disk("working folder", tmp_path).state == "ok"
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**20))
    assert "Free some disk" in hardware._disk("working folder", tmp_path).mend


def test_a_clock_that_follows_the_load_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "governor", lambda: "powersave")
    assert hardware._steadiness().mend == "Run: cpupower frequency-set -g performance."
    monkeypatch.setattr(machine, "load", lambda: 1000.0)
    assert hardware._load().mend == "Let other work end first."


def test_packages_and_extras_that_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    gone, old = "uvicorn", "numpy"

    def version(name: str) -> str:
        if name == gone:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == old else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = named(software.checks())
    assert found["packages"].state == "problem"
    assert "numpy>=2.0 (there is 1.0)" in found["packages"].found
    assert found["extra serve"].state == "note"
    assert "uvicorn>=" in found["extra serve"].found
    assert found["extra serve"].mend == 'For its features run: pip install "onnx-lathe[serve]".'
    assert not {"extra dev", "extra cpu", "extra cuda"} & found.keys()


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_PACKAGE", "onnx-lathe-nowhere")
    assert named(software.checks())["packages"].state == "warning"


def answering(answers: dict[tuple[str, ...], dict[str, Any] | DependencyError]) -> Any:
    """Return a stand-in for `ask` with fixed answers by arguments."""

    def answer(module: str, *arguments: str) -> dict[str, Any]:
        found = answers["torch" if module.endswith("torch_trial") else arguments]
        if isinstance(found, DependencyError):
            raise found
        return found

    return answer


def error(got: str) -> DependencyError:
    return DependencyError("trial", got=got, expected="an answer", mend="Mend it.")


TORCH = {"version": "2.13", "cuda": "", "devices": 0, "bf16": True}


def test_no_onnxruntime_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "ask", answering({(): error("no onnxruntime"), "torch": TORCH}))
    found = named(accelerators.checks())
    assert found["onnxruntime"] == Check("onnxruntime", "problem", "no onnxruntime", "Mend it.")
    assert found["torch"].state == "ok"


def test_a_provider_that_fails_and_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {**BUILD, "providers": ["openvino", "azure", "cpu"]}
    answers: dict[Any, Any] = {
        (): build,
        ("provider", "openvino"): error("a process that died (killed: Aborted)"),
        ("provider", "cpu"): {**CPU, "correct": False},
        "torch": error("a process that died"),
    }
    monkeypatch.setattr(accelerators, "ask", answering(answers))
    found = named(accelerators.checks())
    assert (found["provider openvino"].state, found["provider azure"].state) == ("warning", "note")
    assert (found["provider cpu"].state, found["provider cpu"].found) == ("problem", "2 nodes on cpu: a wrong result")
    assert found["torch"].state == "warning"


def test_cuda_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[Any, Any] = {
        (): {**BUILD, "cuda": "12.8"},
        ("provider", "cpu"): CPU,
        ("cuda",): {"driver": "13.0", "libraries": {"libcudart.so.12": "12.8", "libcudnn.so.9": None}},
        "torch": {**TORCH, "cuda": "13.0", "devices": 1},
    }
    monkeypatch.setattr(accelerators, "ask", answering(answers))
    monkeypatch.setattr(accelerators, "_devices", lambda: ["NVIDIA H100, 81559 MiB, 580.1"])
    found = named(accelerators.checks())
    assert found["GPU"].found == "NVIDIA H100, 81559 MiB, 580.1"
    assert found["CUDA"].state == "warning"
    assert found["CUDA"].found == "driver for CUDA 13.0; found: libcudart.so.12 12.8; missing: libcudnn.so.9"
    assert (found["torch"].state, "built for CUDA 12.8" in found["torch"].found) == ("warning", True)


def test_a_gpu_without_a_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[Any, Any] = {(): BUILD, ("provider", "cpu"): CPU, "torch": TORCH}
    monkeypatch.setattr(accelerators, "ask", answering(answers))
    monkeypatch.setattr(accelerators, "_devices", lambda: ["NVIDIA H100, 81559 MiB, 580.1"])
    found = named(accelerators.checks())
    assert 'pip install "onnx-lathe[cuda]"' in found["CUDA"].mend
    assert found["torch"].mend == "Install torch built for CUDA."


def test_no_torch_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert accelerators._torch([], "").state == "note"


@pytest.mark.parametrize("outcome", [OSError(), subprocess.TimeoutExpired("nvidia-smi", 1), 9])
def test_a_driver_tool_that_fails_finds_nothing(monkeypatch: pytest.MonkeyPatch, outcome: Exception | int) -> None:
    def run(*arguments: Any, **options: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return subprocess.CompletedProcess([], outcome, stdout="NVIDIA-SMI has failed\n")

    monkeypatch.setattr(shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(subprocess, "run", run)
    assert accelerators._devices() == []


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("import os; os.abort()", r"a process that died \(killed: Aborted\)"),
        ("raise ImportError('libcudart.so.12: cannot open')", r"does not load \(libcudart.so.12: cannot open\)"),
        ("", "the remains of an onnxruntime"),
        ("import time; time.sleep(60)", "no answer for 3 s"),
    ],
)
def test_an_onnxruntime_that_is_broken_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, got: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=got):
        ask("onnx_lathe.runtime.trial", timeout=3.0 if "sleep" in body else 60.0)
