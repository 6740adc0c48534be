from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import onnx_lathe
from onnx_lathe.runtime.errors import InputError, ModelFileError, SecretError
from onnx_lathe.runtime.serve import transport
from onnx_lathe.runtime.serve.keys import read_keys
from onnx_lathe.runtime.serve.limits import Limits
from onnx_lathe.runtime.serve.transport import TLS
from tests.graphs import LINEAR, write

KEY = "0123456789abcdef0123456789abcdef"
SLOW = """
slow (int64[N, 1] steps) => (float[N, 1] y)
<bool go = {1}, float[1000] start, float[1] zero = {0.0}>
{
  n = ReduceMax <keepdims = 0> (steps)
  last = Loop (n, go, start) <body = turn (int64 i, bool c, float[1000] a) => (bool d, float[1000] b) {
    d = Identity (c)  b = Sin (a)
  }>
  total = ReduceSum <keepdims = 0> (last)
  wide = Cast <to = 1> (steps)
  nothing = Mul (wide, zero)
  y = Add (nothing, total)
}
"""


@contextmanager
def process(*arguments: str, **variables: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    """Run `lathe serve` and give it with its URL."""
    command = (sys.executable, "-m", "onnx_lathe.converter", "serve", *arguments, "--port", "0", "--threads", "1")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    ) as running:
        try:
            assert running.stderr is not None
            line = running.stderr.readline()
            assert line.startswith("listening on ")
            yield running, line.split()[2]
        finally:
            running.kill()


def get(url: str, context: ssl.SSLContext | None = None) -> int:
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        return answer.status


def until(holds) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            if holds():
                return
        except urllib.error.HTTPError as error:
            error.close()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sigterm_finishes_what_is_held_and_exits_with_0(tmp_path: Path) -> None:
    from tests.graphs import build

    model = tmp_path / "slow.onnx"
    model.write_bytes(build(SLOW).SerializeToString())
    answers: list[dict] = []
    with process(str(model)) as (running, url):
        until(lambda: get(f"{url}/v2/health/ready") == 200)
        entry = {"name": "steps", "shape": [1, 1], "datatype": "INT64", "data": [100_000]}
        body = json.dumps({"inputs": [entry]}).encode()

        def ask() -> None:
            with urllib.request.urlopen(f"{url}/v2/models/slow/infer", body, timeout=30) as answer:
                answers.append(json.load(answer))

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: "lathe_requests_held 1.0" in urllib.request.urlopen(f"{url}/metrics").read().decode())
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=30)
        asking.join(20)
    assert answers[0]["outputs"][0]["shape"] == [1, 1]
    assert running.returncode == 0
    assert json.loads(out.splitlines()[-1])["schema"] == "onnx-lathe/serve/1"
    assert "Traceback" not in err


def test_a_run_that_nobody_waits_for_is_stopped(tmp_path: Path) -> None:
    from tests.graphs import build

    model = tmp_path / "slow.onnx"
    model.write_bytes(build(SLOW).SerializeToString())
    with process(str(model)) as (running, url):
        until(lambda: get(f"{url}/v2/health/ready") == 200)

        def ask(steps: int, microseconds: int) -> int:
            entry = {"name": "steps", "shape": [1, 1], "datatype": "INT64", "data": [steps]}
            body = json.dumps({"inputs": [entry], "parameters": {"timeout": microseconds}}).encode()
            try:
                with urllib.request.urlopen(f"{url}/v2/models/slow/infer", body, timeout=60) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        assert ask(10**9, 100_000) == 504  # hours, if it were not stopped
        assert ask(1, 30_000_000) == 200
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 0
    assert "Traceback" not in err


def test_keys_of_the_environment_never_show(tmp_path: Path) -> None:
    model = write(tmp_path / "linear.onnx", LINEAR)
    with process(str(model), "--host", "0.0.0.0", LATHE_SERVE_KEYS=KEY) as (running, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        until(lambda: get(f"{url}/v2/health/ready") == 200)
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            get(f"{url}/metrics")
        refused.value.close()
        allowed = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(allowed, timeout=20) as answer:
            assert answer.status == 200
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 0
    assert KEY not in out + err


def certificates(folder: Path) -> TLS:
    """Write a certificate for localhost that signs itself, with its key; it is also the CA of clients."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(plain)
    sealed = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))
    (folder / "sealed.pem").write_bytes(sealed)
    for file in folder.glob("*.pem"):
        file.chmod(0o600)
    return TLS(folder / "cert.pem", folder / "key.pem", folder / "cert.pem")


def test_tls_with_certificates_of_clients(tmp_path: Path) -> None:
    tls, model = certificates(tmp_path), write(tmp_path / "linear.onnx", LINEAR)
    servers = []
    serving = threading.Thread(
        target=onnx_lathe.serve,
        args=(model,),
        kwargs={"host": "0.0.0.0", "port": 0, "threads": 1, "tls": tls, "started": servers.append},
    )
    serving.start()
    until(lambda: servers)
    url = servers[0].url.replace("0.0.0.0", "localhost")
    try:
        known = ssl.create_default_context(cafile=str(tls.certificate))
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            get(f"{url}/v2/health/live", known)
        known.load_cert_chain(tls.certificate, tls.key)
        assert url.startswith("https://")
        assert get(f"{url}/v2/health/live", known) == 200
    finally:
        servers[0].stop()
        serving.join(20)
    assert not serving.is_alive()


@pytest.mark.parametrize(
    ("certificate", "key"), [("none.pem", "key.pem"), ("key.pem", "key.pem"), ("cert.pem", "sealed.pem")]
)
def test_files_that_are_no_certificate_and_key_are_refused(tmp_path: Path, certificate: str, key: str) -> None:
    certificates(tmp_path)
    with pytest.raises(InputError, match="TLS certificate and key: got files that cannot be used"):
        transport.context(TLS(tmp_path / certificate, tmp_path / key))


def test_half_of_the_tls_files_is_refused(tmp_path: Path) -> None:
    assert transport.tls_files(None, None, None) is None
    with pytest.raises(InputError, match="got only some of its files"):
        transport.tls_files(tmp_path / "cert.pem", None, None)


def test_an_open_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"host 0\.0\.0\.0: got no keys.* Give --keys FILE .*--allow-anonymous"):
        onnx_lathe.serve(tmp_path / "m.onnx", host="0.0.0.0", port=0)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("::", False), ("example", False)],
)
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert transport.is_loopback(host) is local


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port}: got an address that cannot be listened on"):
            transport.listen("127.0.0.1", port)


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        onnx_lathe.serve(tmp_path / "missing.onnx", port=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no key"),
        (b"# only this\n\n", "got no key"),
        (b"short\n", r"line 1: got 5 characters, expected a key of at least 16"),
        (b"# mine\n0123456789abcdef 2\n", "line 2: got 18 characters"),
        (b"\xff" * 20, "got bytes that are not ASCII"),
    ],
)
def test_a_wrong_file_of_keys_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(SecretError, match=message):
        read_keys(file)


def test_keys_that_others_may_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o644)
    with pytest.raises(SecretError, match="got a file that others may use"):
        read_keys(file)
    file.chmod(0o600)
    assert read_keys(file).accept(f"Bearer {KEY}".encode())


@pytest.mark.parametrize(
    "limits",
    [{"max_batch": 0}, {"max_delay": -1.0}, {"max_requests": 0}, {"max_body": 0}, {"timeout": 0.0}, {"runs": 0}],
)
def test_limits_out_of_range_are_refused(limits: dict) -> None:
    (name,) = limits
    with pytest.raises(InputError, match=f"{name}: got"):
        Limits(**limits)
