"""A model that was opened: a file, a bundle, or a bundle that was decrypted into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.bundle import MODEL, is_bundle, open_bundle
from onnx_lathe.runtime.errors import SecretError
from onnx_lathe.runtime.sealing import is_sealed, open_sealed
from onnx_lathe.runtime.signing import verify


@dataclass(frozen=True)
class Opened:
    """What a session needs of a model.

    Attributes:
        path: The model file, or the encrypted bundle.
        content: The model's bytes where they lie in memory; None where they lie at ``path``.
        beside: The files beside a model in memory, by name.
        provider: Where a bundle's model is to run; None for a plain file.
        threads: Threads that a bundle's model is to run with; None for all CPUs that the process may use.
        warning: What to know about a bundle on this machine; None where there is nothing.
    """

    path: Path
    content: bytes | None = None
    beside: Mapping[str, bytearray] = field(default_factory=dict[str, bytearray])
    provider: str | None = None
    threads: int | None = None
    warning: str | None = None

    def read_graph(self) -> ModelProto:
        """Return the checked graph; large weights may lack their values, and it is not to be changed.

        Raises:
            ModelFileError: It is not a model that may be run.
            ExternalDataError: Its weights are missing, too short or outside its folder.
        """
        if self.content is None:
            return loading.read_skeleton(self.path)
        sizes = {name: len(content) for name, content in self.beside.items()}
        return loading.parse_graph(self.content, f"{self.path}: {MODEL}", sizes)


def open_model(path: Path, *, require_signature: Path | None = None, identity: Path | None = None) -> Opened:
    """Open a model file, a bundle or an encrypted bundle.

    Args:
        path: The file or folder.
        require_signature: The public key that must have signed it; None asks for no signature.
        identity: The file of age identities that opens an encrypted bundle.

    Raises:
        BundleError: A bundle is incomplete or was changed.
        SignatureError: It is not signed by that key, or is a file that no signature covers.
        SecretError: An encrypted bundle needs an identity, or the identity does not open it.
    """
    if is_sealed(path):
        if identity is None:
            raise SecretError(
                str(path),
                got="an encrypted bundle and no identity",
                expected="the identity that opens it",
                mend="Give identity=FILE, or --identity FILE.",
            )
        sealed = open_sealed(path, identity, require_signature)
        beside = {name: content for name, content in sealed.files.items() if name != MODEL}
        content = bytes(sealed.files[MODEL])
        return Opened(path, content, beside, sealed.provider, sealed.threads, sealed.warning)
    if identity is not None:
        raise SecretError(
            str(path),
            got="an identity for what is not encrypted" if path.exists() else "no such file",
            expected="a bundle that `lathe encrypt` wrote",
            mend="Leave the identity out, if it need not be encrypted.",
        )
    if require_signature is not None:
        verify(path, require_signature)
    if is_bundle(path):
        bundle = open_bundle(path)
        return Opened(bundle.model, provider=bundle.provider, threads=bundle.threads, warning=bundle.warning)
    return Opened(path)
