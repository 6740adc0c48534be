"""``python -m onnx_lathe.converter``: the command ``lathe``, for launchers that start modules."""

from onnx_lathe.converter.cli.main import main

main()
