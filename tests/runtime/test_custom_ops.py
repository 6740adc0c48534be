"""Libraries of custom operators: none is loaded but by its hash."""

import hashlib
from pathlib import Path

import pytest

from onnx_lathe.runtime.errors import InputError, ModelFileError
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, write


def test_a_library_needs_its_hash(tmp_path: Path) -> None:
    model, library = write(tmp_path / "m.onnx", LINEAR), tmp_path / "ops.so"
    library.write_bytes(b"not the library that was hashed")
    digest = hashlib.sha256(b"the library that was hashed").hexdigest()
    with pytest.raises(
        InputError, match=rf"ops.so: got sha256 \w+, expected sha256 {digest}. Load it only if you trust"
    ):
        Session(model, custom_ops={library: digest})
    with pytest.raises(InputError, match=r"gone.so: got no such file, expected a library of operators"):
        Session(model, custom_ops={tmp_path / "gone.so": digest})


def test_a_library_that_does_not_load_is_named_by_its_own_path(tmp_path: Path) -> None:
    model, library = write(tmp_path / "m.onnx", LINEAR), tmp_path / "ops.so"
    library.write_bytes(b"no library")
    with pytest.raises(InputError, match=r"ops.so: got a library that does not load: ") as error:
        Session(model, custom_ops={library: hashlib.sha256(b"no library").hexdigest().upper()})
    assert "lathe-operators-" not in str(error.value)


def test_unknown_operators_are_refused_with_the_way_to_allow_them(tmp_path: Path) -> None:
    header = '<ir_version: 10, opset_import: ["": 20, "own": 1]>'
    model = write(tmp_path / "m.onnx", "g (float[n] x) => (float[n] y) { y = own.Secret (x) }", header)
    with pytest.raises(ModelFileError, match=r"custom operators need custom_ops=\{library: sha256\}"):
        Session(model)
