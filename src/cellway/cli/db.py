"""`cellway db`: the schemas of the API database and of every cell's, and the data that moves between them."""

from typing import Annotated

import typer

from cellway.cells.registry import Templates
from cellway.cli import data_migrations
from cellway.cli.deployment import ConfigOption, DataOption, read_config
from cellway.cli.output import Format, FormatOption, note, print_records
from cellway.config import Config, Secret
from cellway.context import SystemClock
from cellway.db.schema import Tree
from cellway.errors import CellwayError, Invalid, NotFound, Unavailable
from cellway.operations import schemas
from cellway.operations.schemas import SchemaReport

app = typer.Typer(help="Make and upgrade schemas, and move data.", no_args_is_help=True, rich_markup_mode=None)
app.command("online-data-migrations", cls=data_migrations.OnlineDataMigrations)(data_migrations.run)
app.add_typer(data_migrations.app, name="migrations")

COLUMNS = ("database", "current", "wanted", "state")

Which = Annotated[list[str] | None, typer.Argument(help="`api`, or names of cells; all of them when none is named.")]


@app.command()
def sync(
    which: Which = None, config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Bring schemas to this release. Safe to run again, and twice at once."""
    loaded = read_config(config, data)
    reports = []
    for name, url, tree in _databases(loaded, which or [], making=True):
        try:
            reports.append(schemas.sync(name, url, tree, limits=loaded.limits))
        except CellwayError as error:
            reports.append(SchemaReport(name, None, None, tree.versions[-1], error.message))
    _print("db.sync", reports, form)


@app.command()
def status(
    which: Which = None, config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Compare schemas with what this release wants. Exit status 8 when one differs or does not answer."""
    loaded = read_config(config, data)
    reports = [
        schemas.read_status(name, url, tree, limits=loaded.limits)
        for name, url, tree in _databases(loaded, which or [], making=False)
    ]
    _print("db.status", reports, form)
    if any(report.problem or report.after != report.head for report in reports):
        raise typer.Exit(8)


def _databases(config: Config, which: list[str], *, making: bool) -> list[tuple[str, Secret | Invalid, Tree]]:
    """Return name, URL and tree of the databases that are meant. Raises: NotFound, Invalid, Unavailable."""
    api = config.api_database.connection
    if api is None:
        raise Invalid("config.no_database", "no deployment is named: there is no [api_database] connection")
    found: list[tuple[str, Secret | Invalid, Tree]] = [("api", api, Tree.API)]
    if which == ["api"]:
        return found
    if making:
        # The cells are listed in it, so it comes first.
        schemas.sync("api", api, Tree.API, limits=config.limits)
    templates = Templates(database=config.database.connection, transport=config.default.transport_url)
    cells = schemas.read_cells(api, limits=config.limits, clock=SystemClock())
    found += [(name, url, Tree.CELL) for name, url in schemas.each_cell(cells, templates)]
    unknown = set(which) - {name for name, _, _ in found}
    if unknown:
        raise NotFound("cell.not_found", f"There is no cell {sorted(unknown)[0]}")
    return [one for one in found if not which or one[0] in which]


def _print(schema: str, reports: list[SchemaReport], form: Format) -> None:
    records = [
        {
            "database": report.database,
            "current": report.after,
            "wanted": report.head,
            "state": "problem" if report.problem else _state(report),
            "problem": report.problem,
        }
        for report in reports
    ]
    print_records(schema, records, COLUMNS, form)
    problems = [report for report in reports if report.problem]
    for report in problems:
        note(f"{report.database}: {report.problem}")
    if problems and schema == "db.sync":
        raise Unavailable("schema.not_synced", f"{len(problems)} of {len(reports)} databases were not upgraded")


def _state(report: SchemaReport) -> str:
    if report.after is None:
        return "no schema"
    if report.after != report.head:
        return "behind"
    return "ok" if report.before == report.after else "upgraded"
