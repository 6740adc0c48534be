"""The command ``lathe``: a thin face on the public functions.

Text for people goes to stderr; the last line of stdout is one JSON object with the schema ``onnx-lathe/VERB/1``. Exit
status: 0 done; 1 failed; 2 bad usage or input; 3 done, but a limit that the user set was missed; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.exceptions import TyperException

from onnx_lathe.converter import launch
from onnx_lathe.converter.cli import judging, models, recipes, sensitivity, shipping, timing
from onnx_lathe.converter.cli.shared import emit
from onnx_lathe.converter.progress import console
from onnx_lathe.runtime.errors import InputError, LatheError

INTERRUPTED = 130


def _check_launch(context: typer.Context) -> None:
    launch.check_verb(context.invoked_subcommand or "")


app = typer.Typer(
    help="From a trained network to the fastest ONNX model that keeps its accuracy on this machine.",
    callback=_check_launch,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    *(recipes.convert, recipes.train, recipes.distill, recipes.export),
    *(models.compile_, models.apply, models.passes),
    *(judging.inspect, judging.run, judging.compare, judging.attribute, judging.doctor),
    sensitivity.sensitivity,
    *(timing.bench, timing.report),
    *(shipping.serve, shipping.deploy),
    *(shipping.sign, shipping.verify, shipping.encrypt, shipping.decrypt),
):
    app.command(name=verb.__name__.rstrip("_"))(verb)


def main() -> None:
    """Run the command; errors become one line on stderr and an exit status, never a traceback.

    Of several processes that torchrun started only the leading one speaks.
    """
    if not launch.leads():
        console.quiet = True
        warnings.simplefilter("ignore")
    try:
        status: Any = app(standalone_mode=False)
    except LatheError as error:
        status = _fail(type(error).__name__, str(error), error.exit_status)
    except TyperException as error:
        status = _fail("UsageError", error.format_message() or "wrong usage", InputError.exit_status)
    except KeyboardInterrupt:
        status = INTERRUPTED
    # typer turns an interruption of a verb into this status.
    if status == INTERRUPTED:
        _fail(
            "Interrupted",
            "interrupted; the same command goes on, or begins anew where the verb keeps nothing",
            INTERRUPTED,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _fail(kind: str, message: str, status: int) -> int:
    if not launch.leads() and status != INTERRUPTED:
        launch.give_way()
        console.quiet, message = False, f"process {launch.rank()}: {message}"
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    emit("error", {"error": kind, "message": message, "exit_status": status})
    return status
