"""Signed bundles: what is refused before it is parsed, and that no key shows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from onnx_lathe.runtime import signing
from onnx_lathe.runtime.bundle import write_bundle
from onnx_lathe.runtime.errors import SecretError, SignatureError
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, write


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed bundle ``b`` and the keys ``k.pem`` and ``k.pub``."""
    folder = tmp_path_factory.mktemp("signed")
    (folder / "notes.txt").write_text("a note")
    files = {"model.onnx": write(folder / "m.onnx", LINEAR), "docs/notes.txt": folder / "notes.txt"}
    write_bundle(folder / "b", files, {}, {"provider": "cpu", "threads": 1})
    assert signing.new_key(folder / "k.pem") == folder / "k.pub"
    assert signing.sign(folder / "b", folder / "k.pem") == folder / "b" / "model.sig"
    return folder


@pytest.fixture
def bundle(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed / "b", tmp_path / "b"))


def test_a_signed_bundle_runs_and_its_key_is_for_its_owner_alone(signed: Path, bundle: Path) -> None:
    files = signing.verify(bundle, signed / "k.pub")
    assert sorted(files) == ["docs/notes.txt", "manifest.json", "model.onnx", "session.toml"]
    session = Session(bundle, require_signature=signed / "k.pub")
    np.testing.assert_array_equal(session.run({"x": np.ones((1, 4), np.float32)})["y"], [[16.5, 19.5]])
    assert (signed / "k.pem").stat().st_mode & 0o777 == 0o600
    assert signing.sign(bundle, signed / "k.pem") == bundle / "model.sig"
    assert not [path for path in bundle.parent.iterdir() if path != bundle]


@pytest.mark.parametrize("name", ["docs/notes.txt", "manifest.json", "model.onnx", "session.toml"])
def test_a_changed_or_missing_file_is_refused_before_it_is_parsed(name: str, signed: Path, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(
        SignatureError, match=rf"b: got changed: {name}, expected exactly the files that the owner of k"
    ):
        Session(bundle, require_signature=signed / "k.pub")
    (bundle / name).unlink()
    with pytest.raises(SignatureError, match=f"got missing: {name}, expected exactly"):
        signing.verify(bundle, signed / "k.pub")


@pytest.mark.parametrize("name", ["more.txt", ".gitignore", "docs/.git/config"])
def test_an_added_file_is_refused(name: str, signed: Path, bundle: Path) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    with pytest.raises(SignatureError, match=f"got added: {name}, expected exactly"):
        signing.verify(bundle, signed / "k.pub")


def test_a_link_is_refused(signed: Path, bundle: Path) -> None:
    (bundle / "link").symlink_to("model.onnx")
    with pytest.raises(SignatureError, match=r"link: got a link or a special file, expected plain files alone"):
        signing.verify(bundle, signed / "k.pub")


@pytest.mark.parametrize("damage", ["cut", "empty", "deep", "payload", "signature", "none"])
def test_a_damaged_signature_is_refused(damage: str, signed: Path, bundle: Path) -> None:
    file = bundle / "model.sig"
    envelope = json.loads(file.read_text())
    if damage == "payload":
        envelope["dsseEnvelope"]["payload"] = envelope["dsseEnvelope"]["payload"].replace("Y", "Z", 1)
    if damage == "signature":
        envelope["dsseEnvelope"]["signatures"] = []
    text = {"cut": file.read_text()[:99], "empty": "{}", "deep": "[" * 200_000}.get(damage, json.dumps(envelope))
    file.write_text(text)
    if damage == "none":
        signing.verify(bundle, signed / "k.pub")
        return
    with pytest.raises(SignatureError, match="b: got a signature that this key did not make, or a damaged one"):
        signing.verify(bundle, signed / "k.pub")


def test_what_is_not_signed_is_refused(signed: Path, bundle: Path) -> None:
    (bundle / "model.sig").unlink()
    with pytest.raises(
        SignatureError, match=r"b: got no model.sig, expected a signed bundle. Sign it with `lathe sign`"
    ):
        Session(bundle, require_signature=signed / "k.pub")
    with pytest.raises(SignatureError, match=r"model.onnx: got a file, expected the folder of a bundle"):
        Session(bundle / "model.onnx", require_signature=signed / "k.pub")


def test_another_key_is_refused(signed: Path, bundle: Path, tmp_path: Path) -> None:
    other = signing.new_key(tmp_path / "other.pem")
    with pytest.raises(SignatureError, match="got a signature that this key did not make"):
        signing.verify(bundle, other)
    with pytest.raises(SecretError, match=r"other.pub: got a file that exists, expected a new file"):
        signing.new_key(tmp_path / "other.pem")


def test_a_private_key_is_not_called_like_a_public_one(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"me.pub: got the name of a public key, expected another ending than .pub"):
        signing.new_key(tmp_path / "me.pub")
    assert not list(tmp_path.iterdir())


def test_keys_that_cannot_be_used_are_named_and_not_shown(signed: Path, bundle: Path, tmp_path: Path) -> None:
    pem, der = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"word")
    plain = serialization.NoEncryption()
    keys = {
        "locked": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, der, locked),
        "rsa": rsa.generate_private_key(65537, 2048).private_bytes(pem, der, plain),
        "koblitz": ec.generate_private_key(ec.SECP256K1()).private_bytes(pem, der, plain),
        "text": b"AGE-SECRET-KEY-1 not a key",
        "open": (signed / "k.pem").read_bytes(),
    }
    expected = {
        "locked": "got a private key with a passphrase",
        "rsa": "got a key of another kind",
        "koblitz": "got a key on secp256k1, expected an elliptic key on one of secp256r1",
        "text": "got a file that is no private key",
        "open": r"got a file that others may use \(mode 644\), .* Run: chmod 600 open.pem",
        "missing": "got no such file, expected a private key",
    }
    before = (bundle / "model.sig").read_bytes()
    for name, message in expected.items():
        path = tmp_path / f"{name}.pem"
        if name in keys:
            path.write_bytes(keys[name])
            path.chmod(0o644 if name == "open" else 0o600)
        with pytest.raises((SecretError, SignatureError), match=message) as error:
            signing.sign(bundle, path)
        for line in keys.get(name, b"").splitlines():
            assert line.decode() not in str(error.value)
    with pytest.raises(SignatureError, match=r"k.pem: got a file that is no public key"):
        signing.verify(bundle, signed / "k.pem")
    with pytest.raises(SignatureError, match=r"gone.pub: got no such file, expected a public key"):
        signing.verify(bundle, tmp_path / "gone.pub")
    assert (bundle / "model.sig").read_bytes() == before


def test_the_folder_may_be_the_working_folder(signed: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    assert os.fspath(signing.sign(Path("."), signed / "k.pem")).endswith("model.sig")
    assert len(signing.verify(Path("."), signed / "k.pub")) == 4
