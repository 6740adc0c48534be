from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import onnx_lathe
from onnx_lathe.runtime.bundle import write_bundle
from onnx_lathe.runtime.errors import BundleError, InputError, ProviderError, UnsupportedModelError
from onnx_lathe.runtime.session import Session
from tests.graphs import CONV_CHAIN, FIXED_BATCH, LINEAR, build, parse


def bundle(folder: Path, model: onnx.ModelProto, *, provider: str = "cpu", threads: int | None = None) -> Path:
    """Write a bundle whose weights lie beside the model."""
    made = folder / "made"
    made.mkdir()
    onnx.save(model, made / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    files = {path.name: path for path in made.iterdir()}
    return write_bundle(folder / "net", files, {}, {"provider": provider, "threads": threads})


def config(repository: Path, name: str = "net") -> model_config_pb2.ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_a_triton_repository_describes_a_model_that_loads(tmp_path: Path) -> None:
    source = bundle(tmp_path, build(CONV_CHAIN), threads=2)
    files = onnx_lathe.deploy(source, "triton", tmp_path / "repo", max_batch=8, max_delay=0.002, replicas=3)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "repo/net/1/model.onnx",
        "repo/net/1/model.onnx.data",
        "repo/net/config.pbtxt",
    ]
    found = config(tmp_path / "repo")
    assert (found.name, found.backend, found.max_batch_size) == ("net", "onnxruntime", 8)
    assert [(each.name, each.data_type, list(each.dims)) for each in found.input] == [
        ("image", model_config_pb2.TYPE_FP32, [3, 8, 8])
    ]
    assert [(each.name, each.data_type, list(each.dims)) for each in found.output] == [
        ("logits", model_config_pb2.TYPE_FP32, [5])
    ]
    assert found.HasField("dynamic_batching")
    assert found.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = found.instance_group
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    feeds = {"image": np.ones((2, 3, 8, 8), np.float32)}
    want = Session(source).run(feeds)["logits"]
    np.testing.assert_array_equal(Session(files[0], threads=2).run(feeds)["logits"], want)


@pytest.mark.parametrize(
    ("text", "dims", "reason"),
    [
        (FIXED_BATCH, [4, 16], "no symbolic first axis"),
        ("f (string[N, 2] x) => (string[N, 2] y) { y = Identity(x) }", [2], None),
        ("f (float[N] x) => (float[N] y) { y = Relu(x) }", [-1], "no dimension but the batch"),
        ("f (float[N, M] x) => (float[N, M] y) { m = ReduceMax(x)  y = Div(x, m) }", [-1, -1], "gets another 'y'"),
    ],
)
def test_triton_joins_requests_only_where_the_answers_stay(
    tmp_path: Path, text: str, dims: list[int], reason: str | None
) -> None:
    onnx_lathe.deploy(bundle(tmp_path, build(text)), "triton", tmp_path / "repo")
    found = config(tmp_path / "repo")
    assert list(found.input[0].dims) == dims
    assert (found.max_batch_size, found.HasField("dynamic_batching")) == ((0, False) if reason else (32, True))
    assert (reason or "name:") in (tmp_path / "repo/net/config.pbtxt").read_text().splitlines()[0]


def test_a_repository_takes_more_models(tmp_path: Path) -> None:
    source = bundle(tmp_path, parse(LINEAR), provider="cpu")
    for name in ("one", "two"):
        onnx_lathe.deploy(source, "triton", tmp_path / "repo", name=name, max_batch=1)
        assert config(tmp_path / "repo", name).name == name
    with pytest.raises(InputError, match=r"repo/two: got something that lies there, expected nothing"):
        onnx_lathe.deploy(source, "triton", tmp_path / "repo", name="two")


def test_what_cannot_be_deployed_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    scalar = bundle(tmp_path, build("f (float[N, 2] x) => (float y) { y = ReduceSum<keepdims = 0>(x) }"))
    refused = [
        (UnsupportedModelError, "'y': got a scalar", scalar, "triton", {}),
        (InputError, "--to: got 'tritn', expected triton or ray-serve", scalar, "tritn", {}),
        (InputError, r"name: got '\.\./up', expected letters", scalar, "triton", {"name": "../up"}),
        (InputError, "replicas: got 0, expected at least 1", scalar, "ray-serve", {"replicas": 0}),
        (BundleError, "got no such folder", tmp_path / "none", "triton", {}),
    ]
    for kind, message, source, target, options in refused:
        with pytest.raises(kind, match=message):
            onnx_lathe.deploy(source, target, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "net"]
    (tmp_path / "other").mkdir()
    elsewhere = bundle(tmp_path / "other", parse(LINEAR), provider="qnn")
    with pytest.raises(ProviderError, match="provider 'qnn': got one that Triton's onnxruntime backend does not have"):
        onnx_lathe.deploy(elsewhere, "triton", tmp_path / "out")


@contextmanager
def two_nodes() -> Generator[tuple[subprocess.Popen[str], str, dict[str, str]]]:
    """Run `tests.converter.two_nodes` and give it with its address and environment."""
    variables = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = (sys.executable, "-m", "tests.converter.two_nodes")
    with subprocess.Popen(command, **pipes, text=True, env=variables) as nodes:
        try:
            yield nodes, nodes.stdout.readline().strip(), variables
        finally:
            nodes.communicate(timeout=60)


@pytest.mark.timeout(240)
def test_a_ray_application_answers_on_two_nodes(tmp_path: Path) -> None:
    source = bundle(tmp_path, build(CONV_CHAIN))
    onnx_lathe.deploy(source, "ray-serve", tmp_path / "app", replicas=2, threads=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = tmp_path / "app/serve.yaml"
    # One proxy: two of one machine would share the port, and the second learns of the application later.
    text = settings.read_text().replace("port: 8000", f"port: {port}")
    settings.write_text(text.replace("proxy_location: EveryNode", "proxy_location: HeadOnly"))
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    tensor = triton.InferInput("image", [2, 3, 8, 8], "FP32")
    tensor.set_data_from_numpy(images)
    with two_nodes() as (nodes, address, variables):
        command = (Path(sys.executable).with_name("serve"), "run", "serve.yaml", "--non-blocking", "--address", address)
        started = subprocess.run(
            command, cwd=tmp_path / "app", env=variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert started.returncode == 0, started.stderr
        nodes.stdin.write("status\n")
        nodes.stdin.flush()
        assert nodes.stdout.readline().strip() == "2 {'RUNNING': 2}"  # of one CPU each: a replica on either
        with triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60) as client:
            assert client.is_server_ready()
            assert client.get_model_metadata("net")["outputs"][0]["name"] == "logits"
            answers = [client.infer("net", [tensor]).as_numpy("logits") for _ in range(8)]
    want = Session(source, threads=1).run({"image": images})["logits"]
    for answer in answers:
        np.testing.assert_array_equal(answer, want)
