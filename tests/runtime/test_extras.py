import numpy as np
import pytest

from onnx_lathe.runtime.errors import DependencyError
from onnx_lathe.runtime.extras import installed_version, require


def test_what_is_installed_passes() -> None:
    assert require("numpy", "onnx", extra="train") is None


def test_a_version_is_that_of_the_package_or_none() -> None:
    assert installed_version("numpy") == np.__version__
    assert installed_version("no-such-package") is None


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    message = r'no_such_package: got a package that is not installed.* Run: pip install "onnx-lathe\[train\]"'
    with pytest.raises(DependencyError, match=message):
        require("numpy", "no_such_package", extra="train")
