"""The command tree, and how every command ends: exit codes and error texts (docs/operations.md).

A command's module is loaded when it is called and not before, so that `cellway --help` is quick. Data goes to stdout,
everything else to stderr.
"""

import difflib
import importlib
import json
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from cellway import __version__
from cellway.errors import (
    CellwayError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    NotFound,
    OverQuota,
    Unavailable,
)

COMMANDS = {
    "up": "run everything in one process over a data folder",
    "api": "serve the HTTP API",
    "builder": "carry out accepted builds and deletions",
    "conductor": "write one cell's database on behalf of its agents",
    "agent": "run the servers of one host",
    "demo": "three cells, nine servers booted through the real client",
    "cell": "list, show, create, update and delete cells",
    "host": "list hosts and map new ones",
    "quota": "show, set, count and verify what projects may have, and have",
    "db": "make and upgrade schemas, and move data out of the cells",
}
"""Command or group, each in the module of its name, with its line in the help."""

EXIT_CODES: tuple[tuple[type[CellwayError], int], ...] = (
    (Invalid, 2),
    (NotFound, 3),
    (Forbidden, 4),
    (OverQuota, 5),
    (Conflict, 5),
    (DeadlineExceeded, 124),
    (Unavailable, 7),
)
"""Exit status by kind of error; any other error is 1, an interrupt 130."""

FIXES = {
    "up.port_taken": "choose another: --port PORT, or stop that program",
    "up.in_use": "stop that process, or choose another folder: --data DIR",
    "cell.not_empty": "cellway cell update NAME --disable   (no new builds), remove its servers and hosts, try again",
    "config.no_database": "name the deployment: --data DIR (of `cellway up`), or --config FILE",
    "process.memory_transport": "cellway cell update NAME --transport-url rabbit://…, as for its conductor and agents",
    "consumer.exists": "stop the other process, which serves this cell or host already, or give this one another name",
    "api_database.unavailable": "cellway db sync   makes the schema; see that the database runs",
    "demo.no_client": "make demo   installs it, or: pip install 'cellway[client]'",
}
"""What to do about an error, by its code."""


class Tree(TyperGroup):
    """The root of the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of their table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cellway.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or name the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], list(COMMANDS), n=1)
            raise typer.BadParameter(
                f"there is no command {args[0]}" + (f"; did you mean {close[0]}?" if close else "")
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table of commands without loading any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=Tree,
    name="cellway",
    help="Cellway: a compute control plane partitioned into cells.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cellway {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Cellway: a compute control plane partitioned into cells."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status: Any = typer.main.get_command(app).main(given, prog_name="cellway", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.TyperException as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except CellwayError as error:
        sys.exit(report(error, wants_json=_wants_json(given)))
    sys.exit(status if isinstance(status, int) else 0)


def _wants_json(arguments: list[str]) -> bool:
    joined = " ".join(arguments)
    return "--format json" in joined or "--format=json" in joined or "-f json" in joined


def report(error: CellwayError, *, wants_json: bool) -> int:
    """Tell about an error, on stderr and for programs also on stdout, and return the exit status for it."""
    status = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
    if wants_json:
        document = {"schema": "cellway.error/1", "error": {"code": error.code, "message": error.message}}
        print(json.dumps(document))
    print(f"error: {error.message}", file=sys.stderr)
    if error.code in FIXES:
        print(f"  fix: {FIXES[error.code]}", file=sys.stderr)
    print(f"  code: {error.code}", file=sys.stderr)
    return status
