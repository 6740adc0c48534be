"""Bundles encrypted at rest: a tar of the bundle in the age format, so that the tool ``age`` opens it too.

Encrypting and decrypting stream, in chunks of 64 KiB that age authenticates one by one (age-encryption.org/v1). Nothing
of a bundle is used before its last chunk was authentic. `open_sealed` keeps what it decrypts in memory.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from onnx_lathe.runtime import bundle as bundles
from onnx_lathe.runtime import signing
from onnx_lathe.runtime.errors import BundleError, SecretError
from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.secrets import read_secret
from onnx_lathe.runtime.staged import make_folder, staged

_MAGIC = (b"age-encryption.org/", b"-----BEGIN AGE ENCRYPTED FILE-----")
_IDENTITY = "AGE-SECRET-KEY-"
_PASSPHRASE, _HEADER = b"\n-> scrypt ", 4096
_CHUNK = 2**20


@dataclass(frozen=True)
class MemoryBundle:
    """A bundle that was decrypted into memory, its files checked against its manifest.

    Attributes:
        path: The encrypted file.
        files: Each file by name.
        provider: Where the model was measured and is to run.
        threads: Threads inside an operator; None for all CPUs that the process may use.
        warning: Set where the bundle was made on another class of CPU; None otherwise.
    """

    path: Path
    files: Mapping[str, bytearray]
    provider: str
    threads: int | None
    warning: str | None


def is_sealed(path: Path) -> bool:
    """Say whether ``path`` is a file in the age format."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC[1])).startswith(_MAGIC)


def encrypt(bundle: Path, output: Path, recipients: Sequence[str]) -> Path:
    """Encrypt a bundle, with its signature where it has one; memory stays flat whatever its size.

    Args:
        bundle: The folder.
        output: The file to write, whole or not at all.
        recipients: Public keys (``age1...``) of those who may open it.

    Raises:
        BundleError: It is no bundle, or a file of it is missing or changed.
        SignatureError: A link or something else that is no plain file lies in it.
        SecretError: There is no recipient, or one is no public key of age.
    """
    age = _age()
    if not recipients:
        raise SecretError("recipients", got="none", expected="at least one", mend="Give a public key (age1...).")
    keys = [_recipient(age, text) for text in recipients]
    opened = bundles.open_bundle(bundle)
    names = sorted(signing.digests(opened.folder))
    names += [signing.SIGNATURE] if (opened.folder / signing.SIGNATURE).is_file() else []
    with staged(output) as part, part.open("wb") as target:
        with _through(lambda source: age.encrypt_io(source, target, keys), "r") as pipe:
            _pack(pipe, opened.folder, names)
        target.flush()
        os.fsync(target.fileno())
    return output


def decrypt(sealed: Path, output: Path, identity: Path) -> Path:
    """Decrypt a bundle into a folder, whole or not at all.

    Args:
        sealed: What `encrypt` wrote.
        output: The folder; nothing may lie there.
        identity: A file of secret keys of age, as ``age-keygen`` writes it, that its owner alone may read.

    Raises:
        BundleError: The file is damaged, no bundle, or something lies at ``output``.
        SecretError: The identity cannot be used, others may read it, or the file was not encrypted for it.
    """
    if output.exists():
        raise BundleError(
            str(output), got="something that lies there", expected="a new folder", mend="Give another output."
        )
    make_folder(output.parent)
    output = output.resolve()
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    try:
        _unpack(sealed, identity, lambda name, _, content: _write(part / name, content))
        bundles.open_bundle(part)
        os.rename(part, output)
    except OSError as error:
        raise BundleError(
            str(output),
            got=f"a disk that does not take it: {error.strerror}",
            expected="room and the right to write there",
            mend="Make room, or give another output.",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output


def open_sealed(sealed: Path, identity: Path, require_signature: Path | None = None) -> MemoryBundle:
    """Decrypt a bundle into memory, and check it against its manifest; nothing of it is written to disk.

    Args:
        sealed: What `encrypt` wrote.
        identity: As for `decrypt`.
        require_signature: The public key that must have signed the bundle; None asks for no signature.

    Raises:
        BundleError: The file is damaged or no bundle.
        SecretError: As `decrypt`.
        SignatureError: It is not signed by that key, or a file differs from what was signed.
    """
    files: dict[str, bytearray] = {}

    def keep(name: str, size: int, content: io.BufferedReader) -> None:
        files[name] = bytearray(size)
        if content.readinto(files[name]) != size:
            raise _damaged(sealed)

    _unpack(sealed, identity, keep)
    signature = files.pop(signing.SIGNATURE, None)
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if require_signature is not None:
        signing.verify_digests(found, None if signature is None else bytes(signature), require_signature, str(sealed))
    if bundles.MANIFEST not in files:
        raise _damaged(sealed)
    manifest = bundles.parse_manifest(bytes(files[bundles.MANIFEST]), sealed)
    if {name: found.get(name) for name in manifest["files"]} != manifest["files"]:
        raise _damaged(sealed)
    options = bundles.parse_session(bytes(files[bundles.SESSION]), sealed / bundles.SESSION)
    warning = bundles.cpu_warning(sealed, manifest)
    return MemoryBundle(sealed, files, options["provider"], options["threads"], warning)


def _pack(pipe: IO[bytes], folder: Path, names: Sequence[str]) -> None:
    """Write files as a tar in which nothing but their names and contents varies."""
    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            with (folder / name).open("rb") as file:
                member = tarfile.TarInfo(name)
                member.size = os.fstat(file.fileno()).st_size
                tar.addfile(member, file)


def _write(path: Path, content: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, _CHUNK)


def _unpack(sealed: Path, identity: Path, take: Callable[[str, int, io.BufferedReader], None]) -> None:
    """Call ``take`` with name, size and content of each file of an encrypted bundle.

    What it took is authentic only when this returns.

    Raises:
        BundleError: The file is damaged, or no encrypted bundle.
        SecretError: The identity does not open it.
    """
    age = _age()
    keys = _identities(age, identity)
    if not is_sealed(sealed):
        raise BundleError(
            str(sealed),
            got="a file that is not encrypted with age" if sealed.exists() else "no such file",
            expected="a bundle that `lathe encrypt` wrote",
            mend="Check the path.",
        )
    with sealed.open("rb") as source:
        if _PASSPHRASE in source.read(_HEADER):
            raise SecretError(
                str(sealed),
                got="a file encrypted with a passphrase",
                expected="one encrypted for the public key of an identity",
                mend="Encrypt the bundle with `lathe encrypt --to age1...`.",
            )
    try:
        with sealed.open("rb") as source, _through(lambda target: age.decrypt_io(source, target, keys), "w") as pipe:
            _read_tar(sealed, pipe, take)
    except age.DecryptError as error:
        if "key" not in str(error).lower():
            raise _damaged(sealed) from None
        raise SecretError(
            str(identity),
            got="an identity that the file was not encrypted for",
            expected=f"one of the recipients of {sealed.name}",
            mend="Give the identity whose public key `lathe encrypt` was given.",
        ) from None
    except (tarfile.TarError, ValueError) as error:
        raise _damaged(sealed) from error
    except OSError as error:
        # age's own have no number; those that have one are of a disk.
        if error.errno is None:
            raise _damaged(sealed) from error
        raise


def _read_tar(sealed: Path, pipe: IO[bytes], take: Callable[[str, int, io.BufferedReader], None]) -> None:
    seen: set[str] = set()
    with tarfile.open(fileobj=pipe, mode="r|") as tar:
        for member in tar:
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            content = tar.extractfile(member) if plain else None
            if content is None or member.name in seen or member.size > sealed.stat().st_size:
                raise _damaged(sealed)
            bundles.check_names(sealed, [member.name])
            seen.add(member.name)
            take(member.name, member.size, cast(io.BufferedReader, content))
    # The end of the last chunk says that no more was cut off.
    while pipe.read(_CHUNK):
        pass


@contextmanager
def _through(work: Callable[[IO[bytes]], None], mode: str) -> Generator[IO[bytes]]:
    """Run ``work`` on one end of a pipe in a thread, reading ("r") or writing ("w") there; give the other end.

    Afterwards the thread is done, and what it raised is raised here.
    """
    reader, writer = os.pipe()
    there, here = (reader, writer) if mode == "r" else (writer, reader)

    def run() -> None:
        with os.fdopen(there, f"{mode}b") as end:
            work(end)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        try:
            with os.fdopen(here, "wb" if mode == "r" else "rb") as end:
                yield end
        except (BrokenPipeError, tarfile.TarError):
            # What broke the pipe is the error of the other end, where there is one.
            fault = done.exception()
            if fault is not None and not isinstance(fault, BrokenPipeError):
                raise fault from None
            raise
        done.result()


def _age() -> Any:
    require("pyrage", extra="security")
    return importlib.import_module("pyrage")


def _recipient(age: Any, text: str) -> Any:
    try:
        return age.x25519.Recipient.from_str(text)
    except age.RecipientError:
        secret = text.upper().startswith(_IDENTITY)
        raise SecretError(
            "recipient",
            got="a secret key" if secret else repr(text[:20]),
            expected="a public key of age (age1...)",
            mend="Give the line that age-keygen calls the public key; keep the secret one to yourself.",
        ) from None


def _identities(age: Any, path: Path) -> list[Any]:
    lines = read_secret(path, "a file of age identities").decode(errors="replace").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    try:
        identities = [age.x25519.Identity.from_str(key) for key in keys]
    except age.IdentityError:
        identities = []
    if not identities:
        locked = bool(keys) and keys[0].startswith(("age-", "-----"))
        raise SecretError(
            str(path),
            got="an identity encrypted with a passphrase" if locked else "no identity",
            expected=f"lines {_IDENTITY}..., as age-keygen writes them",
            mend="Decrypt the identity first, or make one with age-keygen.",
        )
    return identities


def _damaged(sealed: Path) -> BundleError:
    return BundleError(
        str(sealed),
        got="a file that was changed or cut off, or holds no bundle",
        expected="a whole bundle that `lathe encrypt` wrote",
        mend="Copy or make it again.",
    )
