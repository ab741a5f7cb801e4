"""`cellway db online-data-migrations` and `cellway db migrations`: rows that leave the cells while everything serves.

What became of a row is printed as soon as it is decided, before anything is buried in a cell, so that a run that is
killed has told what it did.
"""

import asyncio
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from cellway import online_migrations
from cellway.cli.deployment import ConfigOption, DataOption, opened
from cellway.cli.main import report as report_error
from cellway.cli.output import Format, FormatOption, note, print_records
from cellway.context import Clock, service_context
from cellway.errors import CellwayError, Invalid, NotFound
from cellway.ids import RequestId
from cellway.online_migrations import MIGRATIONS, Options, Outcome, Part, Report, Status
from cellway.quota.moving import Rule

app = typer.Typer(help="How far the online data migrations are.", no_args_is_help=True, rich_markup_mode=None)

COLUMNS = ("migration", "cell", "found", "done", "blocked", "left", "state")
STATUS_COLUMNS = ("migration", "cell", "left", "done", "blocked", "complete_since", "state")

MORE, FAILED, BLOCKED, BAD_ARGUMENT = 1, 2, 3, 127
"""Exit statuses of `online-data-migrations`: the incumbent's, and 3 where it says that all is well."""
INTERRUPTED = 130
PLAIN_PROGRESS_SECONDS = 10.0
CONTEXT = service_context(RequestId("cellway-db-migrations"))


class OnlineDataMigrations(TyperCommand):
    """A command that ends with 127 when it was called wrongly: 2 has another meaning here."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the arguments."""
        try:
            return super().make_context(*args, **kwargs)
        except typer.TyperException as error:
            note(f"error: {error}")
            raise typer.Exit(BAD_ARGUMENT) from error


def _finite(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise typer.BadParameter("it has to be a number of seconds")
    return seconds


def run(
    max_count: Annotated[int | None, typer.Option(min=1, help="Rows to take out of the cells, all together.")] = None,
    cell: Annotated[list[str] | None, typer.Option(help="Name or uuid of a cell; repeat it for several.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a run would do, and write nothing.")] = False,
    on_conflict: Annotated[Rule, typer.Option(help="Whose value stands when cells disagree.")] = Rule.KEEP,
    sleep: Annotated[float, typer.Option(min=0.0, callback=_finite, help="Seconds to rest after every batch.")] = 0.0,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Move rows out of the cells' databases while everything serves. Safe to stop, to repeat, and to run twice at once.

    Exit status: 0 complete, 1 more remains, run it again (with --max-count), 2 failed, 3 rows remain that cannot be
    moved, 127 wrong usage.
    """
    options = Options(frozenset(cell or ()), on_conflict, max_count, dry_run, sleep)
    try:
        report = asyncio.run(_run(config, data, options, form))
    except CellwayError as error:
        report_error(error, wants_json=form == Format.JSON)
        raise typer.Exit(BAD_ARGUMENT if isinstance(error, Invalid | NotFound) else FAILED) from error
    _print(report, options, form)
    raise typer.Exit(_exit_status(report, options))


def _exit_status(report: Report, options: Options) -> int:
    if report.stopped:
        return INTERRUPTED
    if report.problems and (options.most is None or report.done == 0):
        return FAILED
    if report.problems or any(part.has_more for part in report.parts):
        return MORE
    return BLOCKED if any(part.blocked for part in report.parts) else 0


async def _run(config: Path | None, data: Path | None, options: Options, form: Format) -> Report:
    async with opened(config, data) as application:
        with _told_to_stop() as stopping, _shown(form, application.clock) as shown:
            return await online_migrations.run(
                application.cells, CONTEXT, application.clock, options, watch=shown.batch, stopping=stopping
            )


@contextmanager
def _told_to_stop() -> Iterator[asyncio.Event]:
    """Finish the batch in hand at the first signal; a second one ends the process at once."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        stopping.set()
        note("Stopping after this batch; the same command goes on.")
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield stopping
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


# ---- what is shown meanwhile -----------------------------------------------------------------------------------


class _Shown:
    """What a run shows as it goes on: differences, and how far it is."""

    def __init__(self, form: Format, clock: Clock, bar: Progress | None) -> None:
        self._to_stdout = form == Format.TABLE
        self._clock = clock
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=None)
        self._said_at = clock.monotonic()

    def batch(self, part: Part, outcomes: Sequence[Outcome]) -> None:
        """Show a batch."""
        for outcome in outcomes:
            if outcome.is_difference:
                print(_line(part, outcome), file=sys.stdout if self._to_stdout else sys.stderr, flush=True)
        if self._bar is not None and self._task is not None:
            # One bar, for what it is at: there may be hundreds of cells.
            at = f"{part.migration}  {part.cell}"
            self._bar.update(self._task, description=at, completed=part.found, total=part.total)
        elif self._clock.monotonic() - self._said_at >= PLAIN_PROGRESS_SECONDS:
            self._said_at = self._clock.monotonic()
            note(f"{part.migration}  {part.cell}: {part.found} of {part.total}")


@contextmanager
def _shown(form: Format, clock: Clock) -> Iterator[_Shown]:
    if not sys.stderr.isatty():
        yield _Shown(form, clock, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # What goes to a file must not be caught by the bar.
    console, redirect = Console(stderr=True), sys.stdout.isatty()
    with Progress(*columns, console=console, redirect_stdout=redirect, transient=True) as bar:
        yield _Shown(form, clock, bar)


def _line(part: Part, outcome: Outcome) -> str:
    key = "".join(one if one.isprintable() else repr(one)[1:-1] for one in outcome.key)
    value = "NULL" if outcome.value is None else outcome.value
    stands = "" if outcome.stands is None else f", {outcome.stands} stands"
    reason = "" if outcome.reason is None else f": {outcome.reason}"
    return f"{part.migration}  {part.cell}  row {outcome.row_id}  {key}: {value} {outcome.fate}{stands}{reason}"


# ---- and at the end --------------------------------------------------------------------------------------------


def _print(report: Report, options: Options, form: Format) -> None:
    records = [_record(part) for part in report.parts]
    totals = [
        {
            "migration": migration.name,
            "cell": "all",
            **{
                key: sum(one[key] or 0 for one in records if one["migration"] == migration.name) for key in COLUMNS[2:6]
            },
            "state": None,
        }
        for migration in MIGRATIONS
    ]
    more = {
        "totals": totals,
        "dry_run": options.dry,
        "differences": [_item(part, one) for part in report.parts for one in part.differences],
        "blocked": [_item(part, one) for part in report.parts for one in part.blocked],
    }
    shown = [*records, *totals] if form == Format.TABLE else records
    partial = [{"cell": part.cell, "migration": part.migration, "reason": part.problem} for part in report.problems]
    print_records("db.online-data-migrations", shown, COLUMNS, form, partial=partial, more=more)
    for part in report.parts:
        for resource, rows in sorted(part.unknown.items()):
            note(f"{part.migration}  {part.cell}: {rows} rows of {resource}, which is not known, moved as they are")
        if part.reappeared:
            note(f"warning: {part.migration}: {part.cell} had rows, although it was complete")
        if part.problem is not None:
            note(f"warning: {part.migration}: {part.cell} is not finished: {part.problem}")
    if options.dry:
        note("This was a dry run: nothing was written.")


def _record(part: Part) -> dict[str, Any]:
    return {
        "migration": part.migration,
        "cell": part.cell,
        "found": part.found,
        "done": part.done,
        "blocked": len(part.blocked),
        "left": part.left,
        "state": _state(part),
        "fates": part.fates,
        "unknown": part.unknown,
        "reappeared": part.reappeared,
    }


def _state(part: Part) -> str:
    if part.problem is not None:
        return "failed"
    if part.left == 0:
        return "complete"
    return "more" if part.has_more else "blocked"


def _item(part: Part, outcome: Outcome) -> dict[str, Any]:
    return {
        "migration": part.migration,
        "cell": part.cell,
        "row": outcome.row_id,
        "key": outcome.key,
        "fate": outcome.fate,
        "value": outcome.value,
        "stands": outcome.stands,
        "reason": outcome.reason,
    }


@app.command()
def status(config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE) -> None:
    """Show what each cell has left. Exit status 6 when one does not answer, 8 when rows appeared after completion."""
    found = asyncio.run(_status(config, data))
    silent = sorted({one.cell for one in found if one.left is None})
    partial = [{"cell": cell, "reason": "no answer"} for cell in silent]
    print_records("db.migrations.status", list(map(_status_record, found)), STATUS_COLUMNS, form, partial=partial)
    for cell in silent:
        note(f"warning: {cell} did not answer")
    reappeared = [one for one in found if one.reappeared]
    for one in reappeared:
        note(f"warning: {one.migration}: rows have appeared in {one.cell} since it was complete")
    if reappeared:
        note("  fix: cellway db online-data-migrations")
    raise typer.Exit(8 if reappeared else 6 if silent else 0)


async def _status(config: Path | None, data: Path | None) -> list[Status]:
    async with opened(config, data) as application:
        return await online_migrations.read_status(application.cells, CONTEXT)


def _status_record(one: Status) -> dict[str, Any]:
    since = one.complete_since
    return {
        "migration": one.migration,
        "cell": one.cell,
        "left": one.left,
        "done": one.done,
        "blocked": one.blocked,
        "complete_since": None if since is None else since.isoformat(timespec="seconds"),
        "state": _state_of(one),
    }


def _state_of(one: Status) -> str:
    if one.left is None:
        return "no answer"
    if one.reappeared:
        return "rows appeared"
    if one.complete_since is not None:
        return "complete"
    return "blocked" if 0 < one.left <= one.blocked else "incomplete"
