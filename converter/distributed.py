"""Training on several processes: torchrun starts them, each takes its share of every batch.

`DistributedDataParallel` keeps the whole network on each process; FSDP2 (`fully_shard`) a part of every weight,
gradient and optimizer state. On one process each function here does what is left of its job, mostly nothing.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from onnx_lathe.converter import launch
from onnx_lathe.runtime.errors import LatheError, TrainingError

Strategy = Literal["ddp", "fsdp"]

T = TypeVar("T")

_FAILURE = "failure"


@contextmanager
def joined() -> Generator[None]:
    """Join the processes that torchrun started, if it did: over gloo on CPUs, over NCCL on CUDA devices.

    A process that fails leaves its error with the others, whose next exchange breaks as it goes.

    Raises:
        TrainingError: Another process failed; with its message.
    """
    if launch.processes() == 1:
        yield
        return
    place = device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    except LatheError as error:
        if rank != 0:
            told = {"where": f"process {rank}: {error.where}", "got": error.got}
            store.set(_FAILURE, json.dumps({**told, "expected": error.expected, "mend": error.mend}))
        raise
    except RuntimeError as error:
        if not store.check([_FAILURE]):
            raise
        raise TrainingError(**json.loads(store.get(_FAILURE))) from error
    finally:
        _leave()


def _leave() -> None:
    """Leave the process group.

    Gloo's threads abort a process that ends while anything refers to the group, and sharded networks do, in cycles.
    """
    error = sys.exception()
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    dist.destroy_process_group()


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0, which leads."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    """Return where this process trains: the CUDA device of its number on this machine, else the CPU."""
    return torch.device("cuda", launch.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def led(function: Callable[[], T]) -> T:
    """Call a function on the leading process alone, and return to every process what it returned."""
    if size() == 1:
        return function()
    box = [function() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def share(samples: int) -> tuple[slice, int]:
    """Return which samples of a batch this process takes, and how many of them count.

    As many as the others take, or one more. Where there are fewer samples than processes, some take the first one
    without counting it: all must call a network whose weights lie in parts.
    """
    each, more = divmod(samples, size())
    start = rank() * each + min(rank(), more)
    counted = each + (rank() < more)
    return (slice(start, start + counted), counted) if counted else (slice(0, 1), 0)


def total(value: float) -> float:
    """Return the sum of the processes' values."""
    if size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(summed)
    return summed.item()


def parallel(network: nn.Module, strategy: Strategy, precision: str) -> nn.Module:
    """Return the module to call in training, whose gradients are means over the processes.

    On CUDA devices BatchNorm takes its statistics over all processes; torch has no such layer for CPUs.
    """
    if size() == 1:
        return network
    cuda = device().type == "cuda"
    if cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if strategy == "fsdp":
        _shard(network, precision)
        return network
    return DistributedDataParallel(
        network,
        device_ids=[device().index] if cuda else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def frozen(network: nn.Module, strategy: Strategy, precision: str) -> None:
    """Prepare a network that only answers: in eval mode, and in parts where the one that learns is."""
    network.eval().to(device())
    if size() > 1 and strategy == "fsdp":
        _shard(network.requires_grad_(False), precision)


def is_sharded(network: nn.Module) -> bool:
    """Return whether the weights lie in parts on the processes."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that are sharded, or recomputed, one at a time.

    What its attribute ``fsdp_blocks`` lists; else the members with weights of each outermost `torch.nn.ModuleList`
    and `torch.nn.Sequential`. Each must be called as a module.
    """
    declared = getattr(network, "fsdp_blocks", None)
    if declared is not None:
        return list(declared)
    if isinstance(network, nn.ModuleList | nn.Sequential):
        return [child for child in network if any(True for _ in child.parameters())]
    return [block for child in network.children() for block in blocks(child)]


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return the layers that normalize by the statistics of a batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in network.modules() if isinstance(module, kinds)]


def gathered(network: nn.Module) -> Mapping[str, Tensor]:
    """Return all parameters and buffers, whole and on the CPU, on the leading process; nothing on the others."""
    state: dict[str, Tensor] = {}
    for name, tensor in cast(Mapping[str, Tensor], network.state_dict()).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            state[name] = whole.cpu()
    return state


def share_buffers(network: nn.Module) -> None:
    """Give every process the buffers of the leading one, such as BatchNorm's running statistics."""
    if size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def _shard(network: nn.Module, precision: str) -> None:
    lower = precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if lower else MixedPrecisionPolicy()
    # BatchNorm's statistics stay float32, and it takes no mixture.
    exact = MixedPrecisionPolicy(torch.float32, torch.float32, torch.bfloat16)
    policies = dict.fromkeys(batch_norms(network), exact) if lower else {}
    policies |= {block: policy for block in blocks(network) if block not in policies}
    mesh = dist.device_mesh.init_device_mesh(device().type, (size(),))
    for module, own in policies.items():
        fully_shard(module, mesh=mesh, mp_policy=own)
    # The root too, so that no weight stays whole between a judgement and the next step.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
