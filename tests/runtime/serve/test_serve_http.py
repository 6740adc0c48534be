from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from onnx_lathe.runtime.serve.keys import Keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.service import Service
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, write
from tests.runtime.serve.conftest import Gated, Served, running

KINDS = """
kinds (string[N] s, bool[N] b, float16[N] h, uint8[N] u, int64[N] i, double[N] d)
  => (string[N] so, bool[N] bo, float16[N] ho, uint8[N] uo, int64[N] io, double[N] do)
{ so = Identity(s)  bo = Not(b)  ho = Neg(h)  uo = Identity(u)  io = Neg(i)  do = Neg(d) }
"""
INFER = "/v2/models/model/infer"
ONES = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
KEY = "0123456789abcdef0123456789abcdef"

Start = Callable[..., Served]


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return write(tmp_path / "linear.onnx", LINEAR)


@pytest.fixture
def gated(linear: Path) -> Gated:
    return Gated(linear)


def test_tritonclient_sees_server_and_model(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1), name="linear")
    with triton.InferenceServerClient(served.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("linear")
        assert client.is_model_ready("linear", "1")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert client.get_model_metadata("linear", "1") == {
            "name": "linear",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        }
        with pytest.raises(InferenceServerException, match="no such model or version; there is 'linear', version 1"):
            client.get_model_metadata("linear", "2")


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_what_the_session_computes(start: Start, tmp_path: Path, binary: bool) -> None:
    session = Session(write(tmp_path / "kinds.onnx", KINDS), threads=1)
    served = start(session)
    values = {
        "s": np.array(["a", "", "ü"], object),
        "b": np.array([True, False, True]),
        "h": np.array([0.5, 1, 2], np.float16),
        "u": np.array([0, 1, 255], np.uint8),
        "i": np.array([2**62, -1, 0]),
        "d": np.array([1e300, 0.1, -0.0]),
    }
    inputs = []
    for name, array in values.items():
        kind = {"s": "BYTES", "b": "BOOL", "h": "FP16", "u": "UINT8", "i": "INT64", "d": "FP64"}[name]
        inputs.append(triton.InferInput(name, [3], kind))
        inputs[-1].set_data_from_numpy(array, binary_data=binary or name == "h")
    outputs = [triton.InferRequestedOutput(f"{name}o", binary_data=binary or name == "h") for name in "dsbhui"]
    with triton.InferenceServerClient(served.address) as client:
        answer = client.infer("model", inputs, outputs=outputs, request_id="seven")
    assert answer.get_response()["id"] == "seven"
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["do", "so", "bo", "ho", "uo", "io"]
    for name, want in session.run(values).items():
        got = answer.as_numpy(name)
        if name == "so":
            got = np.array([text.decode() if isinstance(text, bytes) else text for text in got], object)
        np.testing.assert_array_equal(got, want)


def test_many_clients_each_get_their_own_answer(start: Start, gated: Gated) -> None:
    served = start(gated)

    def ask(value: int) -> list[float]:
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value, 0, 0, 0]}]}
        status, content, _ = served.ask(INFER, body)
        assert status == 200
        return content["outputs"][0]["data"]

    gated.shut()
    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(ask, 0)
        assert gated.entered.acquire(timeout=20)
        others = [pool.submit(ask, value) for value in range(1, 17)]
        served.until(lambda: served.metric("lathe_queue_length") == 16)
        gated.gate.set()
        assert first.result() == [0.5, 1.5 - 2]
        for value, other in enumerate(others, 1):
            assert other.result() == [value + 0.5, 2 * value - 0.5]
    assert gated.rows == [1, 16]
    assert served.metric('lathe_requests_total{endpoint="infer",status="200"}') == 17


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"\xff", {}, 400, "the request is not JSON"),
        ({"inputs": []}, {}, 400, "input 'x': got no array"),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]},
            {},
            400,
            "input 'x': got shape [1, 3], expected 4 along axis 1 of [batch, 4]",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "INT32", "data": [1, 2, 3, 4]}]},
            {},
            400,
            "input 'x': got dtype int32, expected float32",
        ),
        ({**ONES, "outputs": [{"name": "z"}]}, {}, 400, "output 'z': got an unknown output, expected one of y"),
        (ONES, {"Inference-Header-Content-Length": "9999"}, 400, "Inference-Header-Content-Length is '9999'"),
        (ONES, {"Content-Encoding": "gzip"}, 415, "compressed bodies are not supported"),
    ],
)
def test_a_bad_request_is_told_why(start: Start, linear: Path, body, headers, status: int, message: str) -> None:
    got, content, _ = start(Session(linear, threads=1)).ask(INFER, body, headers)
    assert got == status
    assert list(content) == ["error"]
    assert message in content["error"]


def test_errors_hold_no_paths(start: Start, tmp_path: Path) -> None:
    text = "f (int64[N] x) => (float[N, 2] y) <float[2, 2] table = {1, 2, 3, 4}> { y = Gather(table, x) }"
    served = start(Session(write(tmp_path / "table.onnx", text), threads=1))
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [7]}]}
    status, content, _ = served.ask(INFER, body)
    assert status == 400
    assert content["error"].startswith("model: got a run that failed")
    assert "indices element out of data bounds" in content["error"]
    assert str(tmp_path) not in content["error"]


def test_a_defect_is_answered_without_its_insides(start: Start, gated: Gated) -> None:
    def broken(feeds, outputs=None, *, stop=None):
        raise MemoryError("secret insides")

    served = start(gated)
    served.service._batcher._run = broken
    status, content, _ = served.ask(INFER, ONES)
    assert (status, content) == (500, {"error": "an error inside the server"})
    served.until(lambda: served.metric('lathe_requests_total{endpoint="infer",status="500"}') == 1)


def test_unknown_paths_and_methods_are_answered_in_json(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1))
    assert served.ask("/nope")[:2] == (404, {"error": "Not Found"})
    assert served.ask(INFER)[:2] == (405, {"error": "Method Not Allowed"})
    assert served.ask("/v2/models/other/infer", ONES)[0] == 404


def test_a_body_over_the_limit_is_refused_before_and_while_it_is_read(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1), limits=Limits(max_body=1000))
    assert served.ask(INFER, ONES)[0] == 200
    status, content, headers = served.ask(INFER, bytes(2000))
    assert (status, content["error"], headers["connection"]) == (413, "the body is larger than 1000 bytes", "close")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as raw:
        raw.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            raw.sendall(b"190\r\n" + bytes(400) + b"\r\n")  # never ends: the third chunk passes the limit
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as raw:
        raw.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999999\r\n\r\n".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_chunked_bodies_are_answered(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1))
    text = json.dumps(ONES).encode()
    connection = served.connect()
    connection.request("POST", INFER, iter([text[:7], text[7:]]), encode_chunked=True)
    assert json.load(connection.getresponse())["outputs"][0]["data"] == [16.5, 19.5]
    connection.close()


def test_too_many_requests_are_sent_away(start: Start, gated: Gated) -> None:
    served = start(gated, limits=Limits(max_requests=1))
    gated.shut()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.ask, INFER, ONES)
        assert gated.entered.acquire(timeout=20)
        status, content, headers = served.ask(INFER, ONES)
        assert (status, content["error"]) == (429, "1 requests are being served; try again")
        assert int(headers["retry-after"]) >= 1
        gated.gate.set()
        assert first.result()[0] == 200
    assert served.ask(INFER, ONES)[0] == 200


def test_deadlines_of_the_server_and_of_a_request(start: Start, gated: Gated) -> None:
    served = start(gated, limits=Limits(max_batch=1))
    gated.shut()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.ask, INFER, ONES)
        assert gated.entered.acquire(timeout=20)
        status, content, _ = served.ask(INFER, {**ONES, "parameters": {"timeout": 20_000}})
        assert (status, content["error"]) == (504, "the deadline of the request passed before its answer was there")
        assert served.metric("lathe_queue_length") == 0
        gated.gate.set()
        assert first.result()[0] == 200
    assert gated.rows == [1]
    served = start(gated, limits=Limits(timeout=0.05))
    gated.shut()
    assert served.ask(INFER, ONES)[0] == 504
    gated.gate.set()


def test_what_the_grace_period_cuts_off_is_told(gated: Gated) -> None:
    with running(Service("model", lambda: gated, Limits(), Keys(())), grace=0.1) as served:
        gated.shut()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(served.ask, INFER, ONES)
            assert gated.entered.acquire(timeout=20)
            served.server.stop()
            status, content, _ = waiting.result()
            assert (status, content) == (503, {"error": "the server is stopping"})
            gated.gate.set()


def test_a_body_that_does_not_arrive_is_given_up(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1), limits=Limits(timeout=0.05, max_requests=1))
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as raw:
        raw.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert served.metric("lathe_requests_held") == 0


def test_a_client_that_leaves_frees_its_place_and_disturbs_nobody(start: Start, gated: Gated) -> None:
    served = start(gated)
    text = json.dumps(ONES).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    gated.shut()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.ask, INFER, ONES)
        assert gated.entered.acquire(timeout=20)
        leaving = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        leaving.sendall(head + text)
        half = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        half.sendall(head + text[:20])
        staying = pool.submit(served.ask, INFER, ONES)
        served.until(lambda: served.metric("lathe_queue_length") == 2)
        served.until(lambda: served.metric("lathe_requests_held") == 4)
        leaving.close()
        half.close()
        served.until(lambda: served.metric("lathe_requests_held") == 2)
        gated.gate.set()
        for answer in (first, staying):
            assert answer.result()[1]["outputs"][0]["data"] == [16.5, 19.5]
    assert gated.rows == [1, 1]
    assert served.metric('lathe_requests_total{endpoint="infer",status="499"}') == 2


def test_keys_guard_all_but_health(start: Start, linear: Path) -> None:
    served = start(Session(linear, threads=1), keys=[KEY, "another-key-of-mine"])
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert served.ask(path)[0] == 200
    for path, body in (("/v2", None), ("/metrics", None), ("/v2/models/model", None), (INFER, ONES)):
        for offered in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
            status, content, headers = served.ask(path, body, offered)
            assert (status, content) == (401, {"error": "a valid bearer key is needed"})
            assert headers["www-authenticate"] == 'Bearer realm="lathe"'
        assert served.ask(path, body, {"Authorization": f"Bearer {KEY}"})[0] == 200
        assert served.ask(path, body, {"Authorization": "bearer another-key-of-mine"})[0] == 200
    assert KEY not in repr(vars(served.service.keys))


def test_metrics_of_two_servers_are_apart(start: Start, linear: Path) -> None:
    one, two = start(Session(linear, threads=1)), start(Session(linear, threads=1))
    assert one.ask(INFER, ONES)[0] == 200
    status, text, headers = one.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b'lathe_requests_total{endpoint="infer",status="200"} 1.0' in text
    for name in (b"lathe_batch_rows_count 1.0", b"lathe_queue_seconds_count 1.0", b"lathe_compute_seconds_count 1.0"):
        assert name in text
    assert b'endpoint="infer"' not in two.ask("/metrics")[1]


def test_it_lives_while_it_loads_and_is_not_ready(linear: Path) -> None:
    from onnx_lathe.runtime.serve.server import Server
    from onnx_lathe.runtime.serve.service import Service

    gate = threading.Event()

    def slow() -> Session:
        assert gate.wait(20)
        return Session(linear, threads=1)

    service = Service("model", slow, Limits(), Keys())
    server = Server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    served = Served(server, service)
    assert served.ask("/v2/health/live")[0] == 200
    assert served.ask("/v2/health/ready")[:2] == (503, {"ready": False})
    assert served.ask("/v2/models/model/ready")[0] == 503
    assert served.ask(INFER, ONES)[:2] == (503, {"error": "the model is being loaded"})
    gate.set()
    served.until(lambda: service.ready)
    assert served.ask(INFER, ONES)[0] == 200
    server.stop()
    thread.join(20)
    assert not thread.is_alive()
