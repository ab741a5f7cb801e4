"""How commands print: one list of records as a table, JSON, plain values or CSV; and how logs look.

Tables have no box and are the same when piped. JSON is one document on every path.
"""

import csv
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any

import structlog
import typer


class Format(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"
    VALUE = "value"
    CSV = "csv"


class LogLevel(StrEnum):
    """What is logged: this, and what is worse."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


FormatOption = Annotated[Format, typer.Option("--format", "-f", envvar="CELLWAY_FORMAT", help="How to print.")]

LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="What to log on stderr.")]

Record = Mapping[str, Any]


def print_records(
    schema: str,
    records: Sequence[Record],
    columns: Sequence[str],
    form: Format,
    *,
    partial: Sequence[Record] = (),
    more: Record = MappingProxyType({}),
) -> None:
    """Print records; `columns` are their keys in order. `partial` says which cells are missing, `more` is for JSON."""
    match form:
        case Format.JSON:
            document = {
                "schema": f"cellway.{schema}/1",
                "items": records,
                "partial": partial,
                "as_of": datetime.now(UTC).isoformat(timespec="seconds"),
                **more,
            }
            print(json.dumps(document, default=str))
        case Format.VALUE:
            for record in records:
                print("\t".join(_text(record[column]) for column in columns))
        case Format.CSV:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([_text(record[column]) for column in columns] for record in records)
            print(text.getvalue(), end="")
        case Format.TABLE:
            for line in table([column.replace("_", " ").upper() for column in columns], _rows(records, columns)):
                print(line)


def _rows(records: Sequence[Record], columns: Sequence[str]) -> list[list[str]]:
    return [[_text(record[column]) for column in columns] for record in records]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns two blanks apart, numbers to the right."""
    widths = [max(len(head), *(len(row[index]) for row in rows), 0) for index, head in enumerate(heads)]
    right = [bool(rows) and all(row[index].isdigit() for row in rows) for index in range(len(heads))]
    lines = []
    for cells in (heads, *rows):
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def note(text: str) -> None:
    """Say something to the person at the terminal, on stderr."""
    print(text, file=sys.stderr)


class _Stderr:
    """Writes log lines to whatever stderr is when they are written."""

    def msg(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    debug = info = warning = error = critical = exception = msg


def set_up_logs(level: LogLevel = LogLevel.WARNING, *, as_json: bool = False, serving: bool = False) -> None:
    """Send logs to stderr from `level` on. Tracebacks never show local variables, which may hold anything.

    With `serving`, loggers are made once and kept, which a process that only runs one command need not do.
    """
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_names: _Stderr(),
        cache_logger_on_first_use=serving,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
