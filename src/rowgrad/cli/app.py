"""The command's sub-commands, and how its errors are shown."""

import io
import signal
import sys
import threading
from typing import Annotated, cast

import typer

from rowgrad import __version__
from rowgrad.cli.audit import audit
from rowgrad.cli.check import check
from rowgrad.cli.diagnosis import diagnose
from rowgrad.cli.graph import graph
from rowgrad.cli.train import predict, train
from rowgrad.cli.tune import tune
from rowgrad.errors import RowgradError, UserCodeError

# Typer brings its own copy of Click in some versions and imports Click in others; its errors are found through one.
_ancestors = {base.__name__: base for base in typer.BadParameter.__mro__}
UsageError = cast("type[typer.BadParameter]", _ancestors["ClickException"])

app = typer.Typer(
    name="rowgrad",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(audit)
app.command()(train)
app.command()(tune)
app.command()(predict)
app.command()(graph)
app.command()(diagnose)
app.command()(check)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rowgrad {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The gradients of neural networks, example by example."""


def run(arguments: list[str] | None = None) -> int:
    """Run a command line; errors are one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of classes may not fit the terminal's encoding
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        code = app(args=arguments, prog_name="rowgrad", standalone_mode=False, obj=arguments)
    except UserCodeError as error:
        return _fail(str(error), 2, error.traceback)
    except RowgradError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        code = 130
    except _Ended:
        return _fail("told to end; no results were written", 143)
    except UsageError as error:
        return _fail(error.format_message() + _known(error), 2)
    if code == 130:
        return _fail("interrupted; no results were written", 130)
    return code if isinstance(code, int) else 0


def _known(error: typer.BadParameter) -> str:
    """The options that there are, where one that is not was given."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ != "NoSuchOption" or context is None:
        return ""
    names = sorted(
        name for p in context.command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")
    )
    said = "" if error.format_message().endswith((".", "?")) else "."
    return f"{said} There are {', '.join(names)}." if names else ""


class _Ended(BaseException):
    """SIGTERM, so that temporary folders are removed on the way out."""


def _end(number: int, frame: object) -> None:
    raise _Ended


def _fail(message: str, code: int, below: str = "") -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"rowgrad: {line}\n" + (f"{below}\n" if below else ""))
    return code
