import ctypes
import json
from typing import Any

import pytest

from onnx_lathe.runtime import providers, trial


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = trial.main(list(arguments))
    return status, json.loads(capsys.readouterr().out)


def test_the_build_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = answer(capsys)
    assert status == 0
    assert "cpu" in found["providers"]
    assert found["version"] == providers.onnxruntime().__version__
    assert isinstance(found["cuda"], str)


def test_a_provider_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "provider", "cpu") == (0, {"placement": {"cpu": 2}, "correct": True})


def test_a_provider_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = answer(capsys, "provider", "abacus")
    assert status == 1
    assert found["error"]["got"] == "a provider that this onnxruntime does not have"
    assert found["error"]["mend"]


class Library:
    """Stands for a library of CUDA that tells its version through a pointer, as all do but cuDNN."""

    def __init__(self, name: str) -> None:
        if "curand" in name:
            raise OSError(f"{name}: cannot open shared object file")
        self._function = {"libcuda.so.1": "cuDriverGetVersion", "libcudart.so.12": "cudaRuntimeGetVersion"}.get(name)
        if "cudnn" in name:
            self.cudnnGetVersion = lambda: 91002

    def __getattr__(self, name: str) -> Any:
        if name != self._function:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        def tell(pointer: Any) -> int:
            pointer._obj.value = 12080
            return 0

        return tell


def test_libraries_of_cuda_tell_their_versions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(providers, "load_libraries", lambda provider: None)
    monkeypatch.setattr(trial, "build", lambda: {"cuda": "12.8"})
    assert answer(capsys, "cuda") == (
        0,
        {
            "driver": "12.8",
            "libraries": {
                "libcudart.so.12": "12.8",
                "libcublas.so.12": "",
                "libcublasLt.so.12": "",
                "libnvrtc.so.12": "",
                "libcufft.so.11": "",
                "libcurand.so.10": None,
                "libcudnn.so.9": "9.10.2",
            },
        },
    )
