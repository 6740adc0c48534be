"""Networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from onnx_lathe.converter.batches import to_tensors
from onnx_lathe.converter.models.perceptron import Perceptron
from onnx_lathe.converter.models.residual import ResidualNetwork
from onnx_lathe.converter.named import load_callable
from onnx_lathe.converter.recipe import NetworkOptions
from onnx_lathe.converter.weights import load_weights
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import RecipeError

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "residual": ResidualNetwork,
    "perceptron": Perceptron,
}

Network = TypeVar("Network", bound=nn.Module)


def build(options: NetworkOptions, seed: int, folder: Path | None = None) -> nn.Module:
    """Make a network with fresh weights.

    Args:
        options: A name of `NETWORKS` or ``module:callable``, and its keyword arguments.
        seed: Of the weights.
        folder: Where the module of ``module:callable`` may lie, besides the installed ones.

    Raises:
        RecipeError: There is no such network, it does not have an option, or a value is out of range.
    """
    where = f"network {options.network!r}"
    factory = _factory(options.network, folder)
    _check_keys(where, factory, options.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = factory(**options.options)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(
                f"{where}: options.{'.'.join(map(str, first['loc']))}",
                got=repr(first["input"]),
                expected=first["msg"].removeprefix("Input should be "),
                mend="Change the value.",
            ) from None
    if not isinstance(network, nn.Module):
        raise RecipeError(
            where,
            got=f"a {type(network).__name__}",
            expected="a torch.nn.Module",
            mend="Return the network from the callable.",
        )
    return network


def fold_batchnorm(network: Network) -> Network:
    """Fold each BatchNorm that follows a Conv in a ``torch.nn.Sequential`` into it, and return the network.

    The network is in eval mode afterwards and computes the same; the layers keep their names. What this
    leaves, the exporter folds, but then the weights of the graph are no longer parameters of the network.
    """
    network.eval()
    for module in network.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            convolution, norm = module[index], module[index + 1]
            if isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(
                norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
            ):
                module[index] = fuse_conv_bn_eval(convolution, norm)
                module[index + 1] = nn.Identity()
    return network


def start(
    options: dict[str, Any], weights: str, feeds: str | Sequence[str], threads: int | None, folder: str | None = None
) -> Callable[[], object]:
    """Prepare a network to be measured in torch, eager and at its best: BatchNorm folded, channels last.

    Args:
        options: The fields of `NetworkOptions`.
        weights: The file of `onnx_lathe.converter.weights.save_weights`.
        feeds: An ``.npz`` whose arrays are the inputs of one call, or several that one call runs in turn.
        threads: For operators; None for torch's default.
        folder: See `build`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    network = build(NetworkOptions.model_validate(options), seed=0, folder=None if folder is None else Path(folder))
    load_weights(network, Path(weights))
    fold_batchnorm(network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    files = [feeds] if isinstance(feeds, str) else feeds
    batches = [to_tensors(tensors.load_npz(Path(file))) for file in files]

    @torch.inference_mode()
    def infer() -> object:
        answers = [network(*inputs) for inputs in batches]
        return answers[0] if isinstance(feeds, str) else answers

    return infer


def _factory(network: str, folder: Path | None) -> Callable[..., Any]:
    if ":" in network:
        return load_callable(network, "network", folder)
    if network not in NETWORKS:
        near = difflib.get_close_matches(network, NETWORKS, n=1)
        raise RecipeError(
            "network",
            got=repr(network),
            expected=f"one of {', '.join(NETWORKS)}, or module:callable",
            mend=f"Did you mean {near[0]!r}?" if near else "Change the value.",
        )
    return NETWORKS[network]


def _check_keys(where: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    known = inspect.signature(factory).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in options:
        if key not in known and not open_ended:
            near = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"{where}: options.{key}",
                got="an unknown option",
                expected=f"one of {', '.join(known)}",
                mend=f"Did you mean {near[0]!r}?" if near else "Remove the option.",
            )
    for key, parameter in known.items():
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if needed and key not in options:
            raise RecipeError(
                f"{where}: options.{key}",
                got="no such option",
                expected="a value",
                mend=f"Add {key!r} to the options.",
            )
