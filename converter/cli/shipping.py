"""The verbs that bring a bundle to its users: served, deployed, signed, verified, encrypted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnx_lathe.converter.cli.shared import Model, Threads, emit
from onnx_lathe.converter.progress import console

if TYPE_CHECKING:
    from onnx_lathe.runtime.serve.server import Server

Bundle = Annotated[Path, typer.Argument(help="The folder of a bundle.", show_default=False)]


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="the folder's or file's")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Where to run.", show_default="the bundle's, or cpu")] = None,
    threads: Threads = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows in a run of joined requests; 1 joins none.")] = 32,
    max_delay: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for requests to join.")] = 0.0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests held at once; more are answered 429.")] = 512,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 64,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds from a request to its answer; 0: no limit.")] = 60.0,
    grace: Annotated[float, typer.Option(min=1, help="Seconds to finish requests after SIGTERM.")] = 30.0,
    keys: Annotated[
        Path | None, typer.Option(help="A file of bearer keys, one a line; or set LATHE_SERVE_KEYS.")
    ] = None,
    allow_anonymous: Annotated[bool, typer.Option(help="Answer everyone who reaches the address.")] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="The server's certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Who signs the clients' certificates (PEM).")] = None,
    require_signature: Annotated[
        Path | None, typer.Option(help="The public key (PEM) that must have signed the bundle.")
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="The file of age identities of an encrypted bundle.")] = None,
) -> None:
    """Serve a model over HTTP by the Open Inference Protocol v2, until SIGTERM."""
    from onnx_lathe.runtime.serve.limits import Limits
    from onnx_lathe.runtime.serve.serve import serve
    from onnx_lathe.runtime.serve.transport import tls_files

    limits = Limits(max_batch, max_delay / 1e3, max_requests, max_body * 2**20, timeout or None, runs)
    url = ""

    def started(server: Server) -> None:
        nonlocal url
        url = server.url
        console.print(f"listening on {url} (model {server.name}); stop with SIGTERM", markup=False, soft_wrap=True)

    serve(
        model,
        host=host,
        port=port,
        name=name,
        provider=provider,
        threads=threads,
        limits=limits,
        grace=grace,
        keys_file=keys,
        allow_anonymous=allow_anonymous,
        tls=tls_files(tls_certificate, tls_key, tls_client_ca),
        require_signature=require_signature,
        identity=identity,
        started=started,
    )
    emit("serve", {"model": str(model), "url": url})


def deploy(
    bundle: Bundle,
    to: Annotated[str, typer.Option("--to", help="triton or ray-serve.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="the bundle's folder")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows in a run of joined requests; 1 joins none.")] = 32,
    max_delay: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for requests to join.")] = 0.0,
    replicas: Annotated[int, typer.Option(min=1, help="Sessions: replicas of Ray Serve, instances of Triton.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each.", show_default="the bundle's, or 1 on Ray")
    ] = None,
) -> None:
    """Write what another server needs to serve a bundle: a Triton model repository, or a Ray Serve application."""
    from onnx_lathe.converter.deploy import deploy

    files = deploy(
        bundle,
        to,
        output,
        name=name,
        max_batch=max_batch,
        max_delay=max_delay / 1e3,
        replicas=replicas,
        threads=threads,
    )
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)
    emit("deploy", {"bundle": str(bundle), "to": to, "output": str(output), "files": [str(file) for file in files]})


def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="Your private elliptic key (PEM).", show_default=False)],
    new_key: Annotated[bool, typer.Option(help="Make the key first, and its public half beside it (.pub).")] = False,
) -> None:
    """Sign every file of a bundle: OpenSSF model signing with a local key."""
    from onnx_lathe.runtime import signing
    from onnx_lathe.runtime.bundle import open_bundle

    if new_key:
        open_bundle(bundle)
        public = signing.new_key(key)
        console.print(f"{public} is for those who verify; {key} stays with you.", markup=False)
    signature = signing.sign(bundle, key)
    console.print(f"signed: {signature}", markup=False)
    emit("sign", {"bundle": str(bundle), "signature": str(signature)})


def verify(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="The public key (PEM) of who signed it.", show_default=False)],
) -> None:
    """Check that a bundle holds the files that were signed, unchanged, and no other."""
    from onnx_lathe.runtime.signing import verify

    files = verify(bundle, key)
    console.print(f"{len(files)} files are as they were signed", markup=False)
    emit("verify", {"bundle": str(bundle), "files": files})


def encrypt(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="The encrypted file to write.", show_default=False)],
    to: Annotated[list[str], typer.Option(help="Public key of age (age1...) of who may open it; repeatable.")],
) -> None:
    """Encrypt a bundle in the age format; a session opens it in memory."""
    from onnx_lathe.runtime.sealing import encrypt

    encrypt(bundle, output, to)
    console.print(f"encrypted for {len(to)}: {output}", markup=False)
    emit("encrypt", {"bundle": str(bundle), "output": str(output), "recipients": to})


def decrypt(
    sealed: Annotated[Path, typer.Argument(help="What `lathe encrypt` wrote.", show_default=False)],
    identity: Annotated[Path, typer.Option(help="The file of age identities that opens it.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
) -> None:
    """Decrypt a bundle into a folder."""
    from onnx_lathe.runtime.sealing import decrypt

    decrypt(sealed, output, identity)
    console.print(f"decrypted: {output}", markup=False)
    emit("decrypt", {"sealed": str(sealed), "output": str(output)})
