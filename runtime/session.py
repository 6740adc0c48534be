"""Running a model: onnxruntime behind checked inputs, one kind of error, and a provider that is really used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.custom_ops import registered
from onnx_lathe.runtime.errors import InputError, ModelFileError, ProviderError, TensorError
from onnx_lathe.runtime.loading import nodes
from onnx_lathe.runtime.opened import open_model
from onnx_lathe.runtime.placement import AssignedNode, shape_nodes
from onnx_lathe.runtime.samples import Array

LOG_FATAL_ONLY = 4
"""onnxruntime's severity: what it would log below this is in the errors that are raised."""


MAX_THREADS = 1024
"""More threads than any machine has cores take onnxruntime minutes to start."""
_SCALED_BY_RUN = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}


class Stop:
    """Ends a run from another thread: onnxruntime leaves it before its next operator.

    Attributes:
        options: onnxruntime's ``RunOptions`` of the run.
    """

    def __init__(self) -> None:
        self.options: Any = providers.onnxruntime().RunOptions()
        self.options.log_severity_level = LOG_FATAL_ONLY

    def __call__(self) -> None:
        """End the run."""
        self.options.terminate = True


class Session:
    """A model that is loaded and ready to run. Threads may share it.

    Args:
        model: An ``.onnx`` file, a bundle, or a bundle that `onnx_lathe.encrypt` wrote.
        provider: Where to run, such as "cpu" or "cuda"; None for what the bundle says, or the CPU.
        threads: Threads inside an operator; None for what the bundle says, or all CPUs that the process may use.
        allow_fallback: Whether nodes may run on the CPU that the provider did not take.
        optimize: Whether onnxruntime rewrites the graph; without, each node runs as it is written.
        require_signature: The public key (PEM) that must have signed the bundle; nothing is parsed before that is
            checked. None asks for no signature.
        identity: The file of age identities that opens an encrypted bundle, in memory alone.
        custom_ops: Libraries of custom operators by path, each with the sha256 (hexadecimal) that it must have. They
            are native code: without an entry none is loaded.

    Attributes:
        path: The model file, or the encrypted bundle.
        provider: Where the model runs, by the users' name.
        threads: Threads inside an operator.
        inputs: What a run needs.
        outputs: What it returns.
        scales_by_run: Whether values are rounded on a scale that all rows of a run share (dynamic quantization): the
            answer to a row then depends on the others.
        warning: What to know about the bundle on this machine; None where there is nothing.

    Raises:
        ModelFileError: The file is not a model that onnxruntime can run.
        ExternalDataError: Its weights are missing, too short or outside its folder.
        BundleError: A bundle is incomplete or was changed.
        ProviderError: The provider is not there, or did not take all nodes and ``allow_fallback`` is not set.
        SignatureError: The bundle is not signed by ``require_signature``, or a file of it was changed since.
        SecretError: ``identity`` cannot be used, or does not open the bundle.
        DependencyError: No onnxruntime is installed, or two are.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        allow_fallback: bool = False,
        optimize: bool = True,
        require_signature: str | Path | None = None,
        identity: str | Path | None = None,
        custom_ops: Mapping[str | Path, str] | None = None,
    ) -> None:
        opened = open_model(
            Path(model),
            require_signature=None if require_signature is None else Path(require_signature),
            identity=None if identity is None else Path(identity),
        )
        self.path, self.warning = opened.path, opened.warning
        checked = opened.read_graph()
        self.inputs = tensors.input_specs(checked, str(self.path))
        self.outputs = tensors.output_specs(checked, str(self.path))
        asked = opened.threads if threads is None else threads
        self.threads = providers.default_threads() if asked is None else asked
        self.scales_by_run = any(node.op_type in _SCALED_BY_RUN for node in nodes(checked))
        excused = shape_nodes(checked.graph)
        del checked  # with its weights, where they came in memory
        name = providers.resolve(opened.provider if provider is None else provider)
        self.provider = providers.user_name(name)
        options = session_options(self.threads, optimize=optimize)
        self._weights = opened.beside
        with registered(options, custom_ops or {}):
            self._session = create(opened.path, name, options, opened.content, opened.beside)
        self._output_names = [spec.name for spec in self.outputs]
        if not allow_fallback:
            self._check_provider(excused)

    def run(
        self, feeds: Mapping[str, ArrayLike], outputs: Sequence[str] | None = None, *, stop: Stop | None = None
    ) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: An array for each input, of exactly its dtype.
            outputs: The outputs to return; None or empty for all.
            stop: Ends this run from another thread; each run needs a new one.

        Returns:
            Arrays by output name.

        Raises:
            TensorError: An input or output is missing, unknown, or has a wrong dtype or shape; or the model could not
                run on these values, or was stopped.
        """
        arrays = tensors.check_feeds(self.inputs, feeds)
        tensors.check_names("output", outputs or (), self._output_names)
        names = list(outputs or self._output_names)
        return execute(self._session, str(self.path), arrays, names, stop)

    def placement(self) -> Mapping[str, str]:
        """Return the provider that onnxruntime assigned to each node, by the node's name and the users' name of it.

        Nodes are those that remain after constants are folded and before nodes are fused. A node without a name is
        called by its operator and a number.
        """
        return {node.name or f"{node.operator}_{number}": node.provider for number, node in enumerate(self._assigned())}

    def _assigned(self) -> list[AssignedNode]:
        return [
            AssignedNode(str(node.name), str(node.op_type), providers.user_name(part.ep_name))
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def _check_provider(self, excused: Set[tuple[str, str]]) -> None:
        """Refuse a session whose provider did not load, or left nodes that touch the data to another."""
        active = [providers.user_name(name) for name in self._session.get_providers()]
        if self.provider not in active:
            raise ProviderError(
                f"provider {self.provider!r}",
                got=f"a session on {', '.join(active)}: onnxruntime could not load the provider's libraries",
                expected=f"a session on {self.provider}",
                mend="Install the driver and the libraries that the provider needs; onnxruntime's log names them.",
            )
        elsewhere = (node for node in self._assigned() if node.provider != self.provider)
        if lost := [node for node in elsewhere if (node.name, node.operator) not in excused]:
            shown = ", ".join(f"{node.name or '(no name)'} ({node.operator})" for node in lost[:3])
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ProviderError(
                f"{self.path}: provider {self.provider!r}",
                got=f"{len(lost)} nodes that it did not take: {shown}{more}",
                expected="every node on it but those that only compute shapes",
                mend="Allow a fall-back to the CPU, or choose another provider or another form of the model.",
            )


def session_options(threads: int, *, optimize: bool = True) -> Any:
    """Return onnxruntime's ``SessionOptions`` as every session of ours has them.

    Raises:
        InputError: ``threads`` is under 1 or over `MAX_THREADS`.
    """
    if not 1 <= threads <= MAX_THREADS:
        expected = f"1 to {MAX_THREADS}"
        raise InputError(
            "threads", got=str(threads), expected=expected, mend="Give as many as there are cores, or fewer."
        )
    onnxruntime = providers.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_FATAL_ONLY
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def create(
    path: Path,
    provider: str,
    options: Any,
    content: bytes | None = None,
    beside: Mapping[str, bytearray] | None = None,
) -> Any:
    """Return onnxruntime's ``InferenceSession`` on ``provider`` and, beneath it, the CPU.

    Args:
        path: The model file.
        provider: onnxruntime's name of a provider.
        options: onnxruntime's ``SessionOptions``.
        content: The model's bytes where they lie in memory instead; ``path`` is then what messages call it.
        beside: The files beside it in memory, by name; to be kept as long as the session.

    Raises:
        ModelFileError: onnxruntime cannot run this model.
        ProviderError: A provider other than the CPU could not start with it.
    """
    providers.load_libraries(provider)
    order = list(dict.fromkeys((provider, providers.CPU)))
    if beside:
        sizes = [len(file) for file in beside.values()]
        options.add_external_initializers_from_files_in_memory(list(beside), list(beside.values()), sizes)
        # Without a copy of its own onnxruntime reads the weights in `beside`, which must live as long as the session.
        options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    model = str(path) if content is None else content
    try:
        # Without enable_fallback=0 onnxruntime answers an error of a provider by starting again on the CPU.
        return providers.onnxruntime().InferenceSession(model, options, providers=order, enable_fallback=0)
    except providers.onnxruntime_errors() as error:
        message = providers.clean_message(error)
        if provider != providers.CPU:
            raise ProviderError(
                f"{path}: provider {providers.user_name(provider)!r}",
                got=f"a session that did not start: {message}",
                expected="a model, libraries and a device that the provider can start with",
                mend="Try the provider cpu: if that fails too, the model is at fault.",
            ) from error
        raise ModelFileError(
            str(path),
            got=f"a model that onnxruntime refuses: {message}",
            expected="a model that it can run",
            mend="Export the model again with an opset and operators that this onnxruntime has, or update onnxruntime; "
            "custom operators need custom_ops={library: sha256}.",
        ) from error


def execute(
    session: Any, where: str, arrays: Mapping[str, Array], names: Sequence[str], stop: Stop | None = None
) -> dict[str, Array]:
    """Run onnxruntime's ``InferenceSession`` on checked arrays and return the outputs called ``names``.

    Raises:
        TensorError: onnxruntime could not run the model, called ``where`` in the message, on these values.
    """
    try:
        results = session.run(names, arrays, None if stop is None else stop.options)
    except providers.onnxruntime_errors() as error:
        raise TensorError(
            where,
            got=f"a run that failed: {providers.clean_message(error)}",
            expected="inputs that the model can run on",
            mend="Check the values and sizes of the inputs (token numbers, lengths).",
        ) from error
    return dict(zip(names, results, strict=True))


def start(model: str, feeds: str, provider: str = "cpu", threads: int | None = None) -> Callable[[], object]:
    """Prepare one inference through `Session`, to be timed by `onnx_lathe.benchmarks`.

    Args:
        model: An ``.onnx`` file or a bundle.
        feeds: An ``.npz`` with one batch.
        provider: Where to run.
        threads: Threads inside an operator; None for all CPUs that the process may use.
    """
    session = Session(model, provider=provider, threads=threads)
    arrays = tensors.load_npz(Path(feeds))
    return lambda: session.run(arrays)


def start_plain(model: str, feeds: str, provider: str = "cpu", threads: int | None = None) -> Callable[[], object]:
    """Prepare one inference through a plain ``onnxruntime.InferenceSession``: default options but for the threads.

    Args:
        model: An ``.onnx`` file.
        feeds: An ``.npz`` with one batch.
        provider: Where to run.
        threads: Threads inside an operator; None for all CPUs that the process may use.
    """
    call = start_plain_in_turn(model, [feeds], provider, threads)
    return lambda: call()[0]


def start_plain_in_turn(
    model: str, feeds: Sequence[str], provider: str = "cpu", threads: int | None = None
) -> Callable[[], list[object]]:
    """Prepare what `start_plain` does for several batches, which may have different shapes: a call runs each."""
    onnxruntime = providers.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or providers.default_threads()
    session = onnxruntime.InferenceSession(model, options, providers=[providers.resolve(provider)])
    batches = [tensors.load_npz(Path(path)) for path in feeds]
    return lambda: [session.run(None, arrays) for arrays in batches]
