"""Running a model: onnxruntime behind checked inputs, one kind of error, and a provider that is really used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.bundle import is_bundle, open_bundle
from onnx_lathe.runtime.errors import InputError, ModelFileError, ProviderError, TensorError
from onnx_lathe.runtime.loading import read_graph
from onnx_lathe.runtime.placement import AssignedNode, shape_nodes
from onnx_lathe.runtime.samples import Array

LOG_FATAL_ONLY = 4
"""onnxruntime's severity: what it would log below this is in the errors that are raised."""


class Session:
    """A model that is loaded and ready to run. Threads may share it.

    Args:
        model: An ``.onnx`` file or a bundle.
        provider: Where to run, such as "cpu" or "cuda"; None for what the bundle says, or the CPU.
        threads: Threads inside an operator; None for what the bundle says, or all CPUs that the process may use.
        allow_fallback: Whether nodes may run on the CPU that the provider did not take.
        optimize: Whether onnxruntime rewrites the graph; without, each node runs as it is written.

    Attributes:
        path: The model file.
        provider: Where the model runs, by the users' name.
        threads: Threads inside an operator.
        inputs: What a run needs.
        outputs: What it returns.
        warning: What to know about the bundle on this machine; None where there is nothing.

    Raises:
        ModelFileError: The file is not a model that onnxruntime can run.
        ExternalDataError: Its weights are missing, too short or outside its folder.
        BundleError: A bundle is incomplete or was changed.
        ProviderError: The provider is not there, or did not take all nodes and ``allow_fallback`` is not set.
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
    ) -> None:
        self.path = Path(model)
        self.warning: str | None = None
        if is_bundle(self.path):
            bundle = open_bundle(self.path)
            self.path, self.warning = bundle.model, bundle.warning
            provider = bundle.provider if provider is None else provider
            threads = bundle.threads if threads is None else threads
        checked = read_graph(self.path)
        self.inputs = tensors.input_specs(checked, str(self.path))
        self.outputs = tensors.output_specs(checked, str(self.path))
        self.threads = providers.default_threads() if threads is None else threads
        excused = shape_nodes(checked.graph)
        del checked  # its weights, before onnxruntime reads them again
        name = providers.resolve(provider)
        self.provider = providers.user_name(name)
        self._session = create(self.path, name, session_options(self.threads, optimize=optimize))
        self._output_names = [spec.name for spec in self.outputs]
        if not allow_fallback:
            self._check_provider(excused)

    def run(self, feeds: Mapping[str, ArrayLike], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: An array for each input, of exactly its dtype.
            outputs: The outputs to return; None or empty for all.

        Returns:
            Arrays by output name.

        Raises:
            TensorError: An input or output is missing, unknown, or has a wrong dtype or shape; or the model could not
                run on these values.
        """
        arrays = tensors.check_feeds(self.inputs, feeds)
        tensors.check_names("output", outputs or (), self._output_names)
        names = list(outputs or self._output_names)
        return execute(self._session, str(self.path), arrays, names)

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
        InputError: ``threads`` is under 1.
    """
    if threads < 1:
        raise InputError("threads", got=str(threads), expected="at least 1", mend="Give a positive number of threads.")
    onnxruntime = providers.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_FATAL_ONLY
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def create(path: Path, provider: str, options: Any) -> Any:
    """Return onnxruntime's ``InferenceSession`` on ``provider`` (onnxruntime's name) and, beneath it, the CPU.

    Raises:
        ModelFileError: onnxruntime cannot run this model.
        ProviderError: A provider other than the CPU could not start with it.
    """
    providers.load_libraries(provider)
    order = list(dict.fromkeys((provider, providers.CPU)))
    try:
        # Without enable_fallback=0 onnxruntime answers an error of a provider by starting again on the CPU.
        return providers.onnxruntime().InferenceSession(str(path), options, providers=order, enable_fallback=0)
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
            mend="Export the model again with an opset and operators that this onnxruntime has, or update onnxruntime.",
        ) from error


def execute(session: Any, where: str, arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Run onnxruntime's ``InferenceSession`` on checked arrays and return the outputs called ``names``.

    Raises:
        TensorError: onnxruntime could not run the model, called ``where`` in the message, on these values.
    """
    try:
        results = session.run(names, arrays)
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
    onnxruntime = providers.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or providers.default_threads()
    session = onnxruntime.InferenceSession(model, options, providers=[providers.resolve(provider)])
    arrays = tensors.load_npz(Path(feeds))
    return lambda: session.run(None, arrays)
