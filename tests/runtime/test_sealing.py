"""Encrypted bundles: opened in memory, whole or not at all, and refused where anything was changed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pyrage
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_lathe.runtime import sealing, signing
from onnx_lathe.runtime.bundle import open_bundle, write_bundle
from onnx_lathe.runtime.errors import BundleError, InputError, SecretError, SignatureError
from onnx_lathe.runtime.session import Session
from tests.graphs import LINEAR, parse

X = {"x": np.ones((1, 4), np.float32)}


def identity_file(path: Path, *identities: pyrage.x25519.Identity) -> Path:
    path.write_text("# a comment\n" + "\n".join(map(str, identities)) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed bundle ``b`` of weights beside the graph, ``b.age``, its identity ``i`` and ``k.pub``."""
    folder = tmp_path_factory.mktemp("sealed")
    model = parse(LINEAR)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    files = {"model.onnx": folder / "m.onnx", "m.onnx.data": folder / "m.onnx.data"}
    write_bundle(folder / "b", files, {}, {"provider": "cpu", "threads": 1})
    (folder / "b" / "notes.txt").write_text("not named by the manifest")
    signing.sign(folder / "b", (signing.new_key(folder / "k.pem"), folder / "k.pem")[1])
    identity = pyrage.x25519.Identity.generate()
    identity_file(folder / "i", pyrage.x25519.Identity.generate(), identity)
    sealing.encrypt(folder / "b", folder / "b.age", [str(identity.to_public())])
    (folder / "recipient").write_text(str(identity.to_public()))
    return folder


def test_an_encrypted_bundle_runs_from_memory(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    session = Session(place / "b.age", identity=place / "i", require_signature=place / "k.pub")
    np.testing.assert_array_equal(session.run(X)["y"], [[16.5, 19.5]])
    assert (session.path, session.threads, session.provider) == (place / "b.age", 1, "cpu")
    assert b"m.onnx.data" not in (place / "b.age").read_bytes()
    weights = (place / "b" / "m.onnx.data").read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and weights in path.read_bytes()]


def test_decrypting_gives_the_bundle_back_with_its_signature(place: Path, tmp_path: Path) -> None:
    folder = sealing.decrypt(place / "b.age", tmp_path / "new" / "b", place / "i")
    assert signing.verify(folder, place / "k.pub") == signing.verify(place / "b", place / "k.pub")
    assert open_bundle(folder).threads == 1
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    with pytest.raises(BundleError, match=r"b: got something that lies there, expected a new folder"):
        sealing.decrypt(place / "b.age", folder, place / "i")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_and_any_cut_is_refused(data: st.DataObject, place: Path, tmp_path: Path) -> None:
    content = bytearray((place / "b.age").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    changed = tmp_path / "changed.age"
    changed.write_bytes(content)
    with pytest.raises(InputError):
        Session(changed, identity=place / "i")
    with pytest.raises(InputError):
        sealing.decrypt(changed, tmp_path / "out", place / "i")
    assert not (tmp_path / "out").exists()


def test_who_cannot_open_it_is_told_why(place: Path, tmp_path: Path) -> None:
    sealed = place / "b.age"
    other = identity_file(tmp_path / "other", pyrage.x25519.Identity.generate())
    public = identity_file(tmp_path / "public")
    opened = identity_file(tmp_path / "opened", pyrage.x25519.Identity.generate())
    opened.chmod(0o640)
    (tmp_path / "locked").write_bytes(pyrage.passphrase.encrypt(b"secret", "word"))
    (tmp_path / "locked").chmod(0o600)
    cases = {
        other: "other: got an identity that the file was not encrypted for, expected one of the recipients of b.age",
        public: "public: got no identity, expected lines AGE-SECRET-KEY-...",
        opened: r"opened: got a file that others may use \(mode 640\)",
        tmp_path / "locked": "locked: got an identity encrypted with a passphrase",
        tmp_path / "gone": "gone: got no such file",
    }
    for identity, message in cases.items():
        with pytest.raises(SecretError, match=message) as error:
            Session(sealed, identity=identity)
        assert "AGE-SECRET-KEY-1" not in str(error.value)
    with pytest.raises(SecretError, match=r"b.age: got an encrypted bundle and no identity"):
        Session(sealed)
    with pytest.raises(SecretError, match=r"b: got an identity for what is not encrypted"):
        Session(place / "b", identity=place / "i")
    with pytest.raises(SecretError, match="locked: got a file encrypted with a passphrase"):
        Session(tmp_path / "locked", identity=place / "i")


def test_recipients_are_public_keys(place: Path, tmp_path: Path) -> None:
    secret = str(pyrage.x25519.Identity.generate())
    with pytest.raises(SecretError, match="recipient: got a secret key, expected a public key of age") as error:
        sealing.encrypt(place / "b", tmp_path / "x.age", [secret])
    assert secret not in str(error.value)
    with pytest.raises(SecretError, match="recipient: got 'age1foo'"):
        sealing.encrypt(place / "b", tmp_path / "x.age", ["age1foo"])
    with pytest.raises(SecretError, match="recipients: got none"):
        sealing.encrypt(place / "b", tmp_path / "x.age", [])
    assert not list(tmp_path.iterdir())


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


@pytest.mark.parametrize(
    "members",
    [
        [member("../escape", b"x")],
        [member("/absolute", b"x")],
        [member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [member("hard", type=tarfile.LNKTYPE, linkname="manifest.json")],
        [member("device", type=tarfile.CHRTYPE)],
        [member("twice", b"1"), member("twice", b"2")],
        [member("sparse", b"", pax_headers={"GNU.sparse.map": "a,b", "GNU.sparse.size": "4"})],
        [member("huge", b"", size=2**45)],
        [member("manifest.json", b"{}")],
        [member("other.txt", b"no manifest")],
    ],
    ids=lambda members: members[0][0].name.strip("./"),
)
def test_hostile_archives_are_refused(
    members: list[tuple[tarfile.TarInfo, bytes]], place: Path, tmp_path: Path
) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT):
        for info, content in members:
            archive.write(info.tobuf(tarfile.PAX_FORMAT))
            archive.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
    recipient = pyrage.x25519.Recipient.from_str((place / "recipient").read_text())
    (tmp_path / "h.age").write_bytes(pyrage.encrypt(archive.getvalue(), [recipient]))
    with pytest.raises(BundleError, match=r"h\.age"):
        Session(tmp_path / "h.age", identity=place / "i")
    with pytest.raises(BundleError):
        sealing.decrypt(tmp_path / "h.age", tmp_path / "out", place / "i")
    assert [path.name for path in tmp_path.iterdir()] == ["h.age"]


def test_a_signature_inside_is_asked_for(place: Path, tmp_path: Path) -> None:
    folder = sealing.decrypt(place / "b.age", tmp_path / "b", place / "i")
    (folder / "more.txt").write_text("added after signing")
    recipient = (place / "recipient").read_text()
    sealing.encrypt(folder, tmp_path / "added.age", [recipient])
    with pytest.raises(SignatureError, match=r"added.age: got added: more.txt"):
        Session(tmp_path / "added.age", identity=place / "i", require_signature=place / "k.pub")
    (folder / "model.sig").unlink()
    sealing.encrypt(folder, tmp_path / "unsigned.age", [recipient])
    with pytest.raises(SignatureError, match=r"unsigned.age: got no model.sig"):
        Session(tmp_path / "unsigned.age", identity=place / "i", require_signature=place / "k.pub")
    assert Session(tmp_path / "unsigned.age", identity=place / "i").inputs[0].name == "x"
