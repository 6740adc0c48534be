"""Signatures of bundles: OpenSSF model signing with a local elliptic key, nothing asked of any server.

The signature covers every file of a bundle but itself. It is verified before anything of the bundle is parsed.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from onnx_lathe.runtime.bundle import MANIFEST, file_digest, open_bundle
from onnx_lathe.runtime.errors import SecretError, SignatureError
from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.secrets import read_secret, write_secret

SIGNATURE = "model.sig"
"""The file in a bundle that holds its signature."""

MAX_SIGNATURE_BYTES = 2**24
"""A signature takes some 200 bytes for each file of a bundle."""

_MET = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
_DIFFERS = "Signature mismatch"
"""How the library's complaint begins where the signature is sound and the files are others."""
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""The curves that OpenSSF model signing knows (NIST P-256, P-384, P-521)."""


def new_key(private: Path) -> Path:
    """Write a new private key on NIST P-256 for its owner alone, and its public half beside it; return that.

    Raises:
        SecretError: One of the two files is there already.
    """
    require("cryptography", extra="security")
    ec: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    serialization: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    public = private.with_suffix(".pub")
    if public == private:
        raise SecretError(
            str(private),
            got="the name of a public key",
            expected="another ending than .pub",
            mend="Call it me.pem, say.",
        )
    if public.exists():
        raise SecretError(str(public), got="a file that exists", expected="a new file", mend="Give another path.")
    key = ec.generate_private_key(ec.SECP256R1())
    pem, formats = serialization.Encoding.PEM, (serialization.PrivateFormat, serialization.PublicFormat)
    write_secret(private, key.private_bytes(pem, formats[0].PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, formats[1].SubjectPublicKeyInfo))
    return public


def sign(bundle: Path, key: Path) -> Path:
    """Sign every file of a bundle, replacing an older signature.

    Args:
        bundle: The folder.
        key: A private elliptic key (PEM, NIST P-256, P-384 or P-521, no passphrase) that its owner alone may read.

    Returns:
        The signature, ``model.sig`` in the bundle.

    Raises:
        BundleError: It is no bundle, or a file of it is missing or changed.
        SignatureError: A link or something else that is no plain file lies in the bundle.
        SecretError: The key cannot be used, or others may read it.
    """
    require("model_signing", "cryptography", extra="security")
    _check_private(key)
    bundle = bundle.resolve()
    open_bundle(bundle)
    digests(bundle)
    signing: Any = importlib.import_module("model_signing.signing")
    hashing: Any = importlib.import_module("model_signing.hashing")
    covered = hashing.Config().set_ignored_paths(paths=[bundle / SIGNATURE], ignore_git_paths=False)
    config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(covered)
    target = bundle / SIGNATURE
    part = bundle.with_name(f".{bundle.name}.{SIGNATURE}")
    try:
        config.sign(bundle, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def verify(bundle: Path, key: Path) -> Mapping[str, str]:
    """Check that a bundle holds the files that were signed, unchanged, and no other; nothing is parsed before.

    Args:
        bundle: The folder.
        key: The public key (PEM) of who must have signed it.

    Returns:
        The sha256 of each file by name.

    Raises:
        SignatureError: There is no signature, another key made it, or a file was changed, added or removed.
    """
    if not bundle.is_dir():
        raise SignatureError(
            str(bundle),
            got="a file" if bundle.exists() else "no such folder",
            expected="the folder of a bundle, which a signature covers whole",
            mend="Give the bundle's folder; `lathe sign` signs bundles.",
        )
    if not (bundle / SIGNATURE).is_file():
        raise _unsigned(bundle)
    found = digests(bundle)
    with (bundle / SIGNATURE).open("rb") as file:
        signature = file.read(MAX_SIGNATURE_BYTES + 1)
    verify_digests(found, signature, key, str(bundle))
    return found


def verify_digests(found: Mapping[str, str], signature: bytes | None, key: Path, where: str) -> None:
    """Check files, known by their sha256 as hexadecimal digits, against a signature; see `verify`.

    Raises:
        SignatureError: As `verify`.
    """
    require("model_signing", "cryptography", extra="security")
    if signature is None:
        raise _unsigned(Path(where))
    _check_public(key)
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise SignatureError(
            where,
            got=f"a signature of {len(signature)} bytes or more",
            expected=f"at most {MAX_SIGNATURE_BYTES}",
            mend="Do not use it: get it again from who signed it.",
        )
    exceptions: Any = importlib.import_module("cryptography.exceptions")
    verifying: Any = importlib.import_module("model_signing.verifying")
    config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_Hashed(found))
    with tempfile.TemporaryDirectory(prefix="lathe-signature-") as folder:
        file = Path(folder) / SIGNATURE
        file.write_bytes(signature)
        try:
            # The library prints its warnings on stdout, where scripts read.
            with contextlib.redirect_stdout(io.StringIO()):
                config.verify(Path(where), file)
        # What the library meets on the way through a signature that was tampered with, or made by another key.
        except (*_MET, exceptions.InvalidSignature) as error:
            differs = str(error).startswith(_DIFFERS)
            raise SignatureError(
                where,
                got=_difference(found, signature)
                if differs
                else "a signature that this key did not make, or a damaged one",
                expected=f"exactly the files that the owner of {key.name} signed",
                mend="Do not use it: get it again from who signed it, or check that the key is theirs.",
            ) from None


def _difference(found: Mapping[str, str], signature: bytes) -> str:
    """Say how files differ from those of a signature that its key did make."""
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    signed = {str(item["name"]): str(item["digest"]) for item in payload["predicate"]["resources"]}
    kinds = {
        "changed": [name for name in signed if name in found and found[name] != signed[name]],
        "added": [name for name in found if name not in signed],
        "missing": [name for name in signed if name not in found],
    }
    return "; ".join(f"{kind}: {', '.join(sorted(names)[:5])}" for kind, names in kinds.items() if names)


def digests(bundle: Path) -> dict[str, str]:
    """Return the sha256 of every file of a bundle but its signature, by name.

    Raises:
        SignatureError: Something in the folder is neither a folder nor a plain file.
    """
    found: dict[str, str] = {}
    for path in sorted(bundle.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise SignatureError(
                str(path),
                got="a link or a special file",
                expected="plain files alone in a signed bundle",
                mend="Replace it by a copy of what it points to.",
            )
        name = path.relative_to(bundle).as_posix()
        if name != SIGNATURE:
            found[name] = file_digest(path)
    return found


class _Hashed:
    """Stands for the hashing configuration of the library: the digests are known already."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self._found = found

    def add_ignored_paths(self, **_: object) -> None:
        """Ignore nothing but the signature itself, whatever was ignored when it was made."""

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:
        """Return the manifest of the library for the known digests."""
        del files_to_hash
        manifest: Any = importlib.import_module("model_signing.manifest")
        digest: Any = importlib.import_module("model_signing._hashing.hashing").Digest
        items = [
            manifest.FileManifestItem(path=PurePosixPath(name), digest=digest("sha256", bytes.fromhex(value)))
            for name, value in self._found.items()
        ]
        kind = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        return manifest.Manifest(model_path.name, items, manifest.SerializationType.from_args(kind))


def _unsigned(bundle: Path) -> SignatureError:
    return SignatureError(
        str(bundle),
        got=f"no {SIGNATURE}",
        expected="a signed bundle",
        mend=f"Sign it with `lathe sign`, and leave {SIGNATURE} beside {MANIFEST}.",
    )


def _check_private(key: Path) -> None:
    serialization: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    content = read_secret(key, "a private key")
    try:
        loaded = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, _unsupported()) as error:
        locked = isinstance(error, TypeError)
        raise SecretError(
            str(key),
            got="a private key with a passphrase" if locked else "a file that is no private key",
            expected="an elliptic private key in PEM, without a passphrase",
            mend="Write one with `lathe sign --new-key`, or: openssl ecparam -name prime256v1 -genkey -noout",
        ) from None
    _check_curve(key, loaded)


def _check_public(key: Path) -> None:
    serialization: Any = importlib.import_module("cryptography.hazmat.primitives.serialization")
    if not key.is_file():
        raise SignatureError(str(key), got="no such file", expected="a public key in PEM", mend="Check the path.")
    try:
        loaded = serialization.load_pem_public_key(key.read_bytes())
    except (ValueError, _unsupported()):
        raise SignatureError(
            str(key),
            got="a file that is no public key",
            expected="an elliptic public key in PEM",
            mend="Give the public half of the key; openssl ec -in PRIVATE -pubout writes it.",
        ) from None
    _check_curve(key, loaded)


def _unsupported() -> type[Exception]:
    """Return what cryptography raises for a curve that it does not know."""
    return importlib.import_module("cryptography.exceptions").UnsupportedAlgorithm


def _check_curve(path: Path, key: Any) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        raise SignatureError(
            str(path),
            got=f"a key on {curve}" if curve else f"a key of another kind ({type(key).__name__})",
            expected=f"an elliptic key on one of {', '.join(_CURVES)}",
            mend="Make one with `lathe sign --new-key`.",
        )
