"""Trying out torch in a process of its own: ``python -m onnx_lathe.converter.diagnosis.torch_trial``."""

from __future__ import annotations

import json

import torch


def main() -> None:
    """Print version, CUDA version ("" where it is built without), GPUs seen and whether bf16 runs at speed, as JSON."""
    cuda = torch.version.cuda or ""
    devices = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
    bf16 = torch.cuda.is_bf16_supported() if devices else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    print(json.dumps({"version": torch.__version__, "cuda": cuda, "devices": devices, "bf16": bf16}))  # noqa: T201


if __name__ == "__main__":
    main()
