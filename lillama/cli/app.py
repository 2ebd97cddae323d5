"""The command line: parse, make one call, print. Logs and progress go to stderr, results to stdout.
A command imports what it computes with when it is called, so that --help is instant."""

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperCommand

from lillama.cli.compress import compress
from lillama.cli.eval import evaluate
from lillama.cli.export import export
from lillama.cli.finetune import finetune
from lillama.cli.generate import generate
from lillama.cli.output import errors
from lillama.cli.plan import plan
from lillama.cli.report import report
from lillama.cli.sample import sample
from lillama.cli.serve import serve
from lillama.errors import InputError, LillamaError
from lillama.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="lillama",
    help="Make a trained language model smaller.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# BadParameter < UsageError < ClickException: typer exports the first only, and may vendor click.
_CommandError: Any = typer.BadParameter.__mro__[2]


class _Command(TyperCommand):
    """A command that silences other libraries before it runs, and not for its --help."""

    def invoke(self, ctx: Any) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # the Hub's as well
        transformers_logging.set_verbosity_error()
        if errors.is_terminal and constants.HF_HUB_DISABLE_PROGRESS_BARS is not True:
            enable_progress_bars()  # of downloads
        return super().invoke(ctx)


COMMANDS = (compress, plan, evaluate, finetune, generate, export, report, sample, serve)
for _run in COMMANDS:
    app.command("eval" if _run is evaluate else None, cls=_Command)(_run)


def _version(shown: bool) -> None:
    if shown:
        print(f"lillama {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, block by block.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    handler = RichHandler(console=errors, show_path=False)
    package = logging.getLogger("lillama")
    package.handlers = [handler]
    package.setLevel(logging.INFO if verbose else logging.WARNING)
    package.propagate = False
    if context.invoked_subcommand is None:
        raise InputError(
            "no command given; use compress, finetune, plan, eval, generate, export, report, "
            "sample or serve (see --help)"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code, 2 usage and 1 failure."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then end
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer's silent answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except _CommandError as error:
        message, code = error.format_message(), error.exit_code
    except LillamaError as error:
        message, code = str(error), error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        message, code = "interrupted; nothing was left half-written", 1  # a second Ctrl-C
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message, code = "out of memory; lower --seq-len or --tokens", 1
    except OSError as error:  # a folder without permission, a disk that went away
        message, code = str(error), 1
    print(f"lillama: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
