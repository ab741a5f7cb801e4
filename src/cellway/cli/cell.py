"""`cellway cell`: the cells of a deployment. Connection URLs are shown without their passwords."""

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from cellway.cells import mappings
from cellway.cells.mappings import CellMapping
from cellway.cli.deployment import ConfigOption, DataOption, opened
from cellway.cli.output import Format, FormatOption, note, print_records
from cellway.config import Secret
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.errors import Conflict, Invalid
from cellway.ids import CELL0_UUID, CellUuid, is_uuid
from cellway.operations.urls import check_url, masked

app = typer.Typer(help="List, show, create, update and delete cells.", no_args_is_help=True, rich_markup_mode=None)

COLUMNS = ("name", "uuid", "state", "hosts", "servers", "database", "transport")

NameArgument = Annotated[str, typer.Argument(help="Name or uuid of the cell.")]
DatabaseUrl = Annotated[
    str | None, typer.Option(help="URL of the cell's database, or env:NAME or file:PATH that holds it; - reads stdin.")
]
TransportUrl = Annotated[
    str | None, typer.Option(help="URL of the cell's message queue, or env:NAME or file:PATH; none:/// for cell0.")
]


def _record(tx: ApiTx, cell: CellMapping) -> dict[str, Any]:
    return {
        "name": cell.name,
        "uuid": cell.uuid,
        "state": "disabled" if cell.disabled else "enabled",
        "hosts": mappings.count_hosts(tx, cell.id),
        "servers": mappings.count_instances(tx, cell.id),
        "database": masked(cell.database_connection),
        "transport": masked(cell.transport_url),
    }


def _list(tx: ApiTx) -> list[dict[str, Any]]:
    return [_record(tx, cell) for cell in sorted(mappings.list_cells(tx), key=lambda cell: cell.name)]


def _show(tx: ApiTx, name: str) -> dict[str, Any]:
    return _record(tx, mappings.get_cell(tx, name))


@app.command("list")
def list_(config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE) -> None:
    """List the cells, with how many hosts and servers each has."""
    print_records("cell.list", asyncio.run(_read(config, data, _list)), COLUMNS, form)


@app.command()
def show(
    name: NameArgument, config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE
) -> None:
    """Show one cell."""
    _print_one(asyncio.run(_read(config, data, _show, name)), form)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the new cell; cell0 is the cell without hosts.")],
    database_url: DatabaseUrl = None,
    transport_url: TransportUrl = None,
    cell_uuid: Annotated[str | None, typer.Option("--uuid", help="Its uuid, else a new one.")] = None,
    disabled: Annotated[bool, typer.Option("--disabled", help="Take no builds yet.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Make a cell known. Its database needs a schema: cellway db sync."""
    own = CELL0_UUID if name == "cell0" else CellUuid(_uuid(cell_uuid))
    database = _url(database_url, "database")
    transport = _url(transport_url or ("none:///" if name == "cell0" else None), "transport")
    if database is None or transport is None:
        raise Invalid("cell.incomplete", "a cell needs --database-url and --transport-url")

    def make(tx: ApiTx) -> dict[str, Any]:
        _refuse_shared(tx, own, database, transport)
        return _record(
            tx,
            mappings.create_cell(
                tx, own, name, transport_url=transport, database_connection=database, disabled=disabled
            ),
        )

    _print_one(asyncio.run(_write(config, data, make)), form)
    note("next: cellway db sync")


@app.command()
def update(
    name: NameArgument,
    rename: Annotated[str | None, typer.Option("--name", help="New name.")] = None,
    database_url: DatabaseUrl = None,
    transport_url: TransportUrl = None,
    disable: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Take no builds, or take them again.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Change a cell. What is not named stays; running processes follow within seconds."""
    database, transport = _url(database_url, "database"), _url(transport_url, "transport")

    def change(tx: ApiTx) -> dict[str, Any]:
        cell = mappings.get_cell(tx, name)
        if cell.is_cell0 and disable is not None:
            raise Conflict("cell.cell0", "cell0 takes no builds, so it is neither disabled nor enabled")
        _refuse_shared(tx, cell.uuid, database, transport)
        changed = mappings.update_cell(
            tx, cell.uuid, name=rename, transport_url=transport, database_connection=database, disabled=disable
        )
        return _record(tx, changed)

    _print_one(asyncio.run(_write(config, data, change)), form)


@app.command()
def delete(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Forget a cell that has no hosts and no servers. Its database is left as it is."""

    def remove(tx: ApiTx) -> str:
        cell = mappings.get_cell(tx, name)
        if cell.is_cell0:
            raise Conflict("cell.cell0", "cell0 is where servers without a host are kept; it is not deleted")
        mappings.delete_cell(tx, cell)
        return cell.name

    note(f"{asyncio.run(_write(config, data, remove))} is deleted. Its database is left as it is.")


def _uuid(given: str | None) -> str:
    if given is None:
        return str(uuid.uuid4())
    if not is_uuid(given):
        raise Invalid("cell.bad_uuid", f"{given} is not a uuid")
    return str(uuid.UUID(given))


def _url(given: str | None, kind: str) -> Secret | None:
    if given is None:
        return None
    text = sys.stdin.readline().strip() if given == "-" else given
    if given != "-" and masked(Secret(text)) != text:
        note(f"warning: the {kind} password was on the command line, where others may see it; use - or file:PATH")
    return check_url(Secret(text), kind)


def _refuse_shared(tx: ApiTx, own: CellUuid, database: Secret | None, transport: Secret | None) -> None:
    """Two cells on one database would each show the other's servers; on one queue, take each other's messages."""
    for cell in mappings.list_cells(tx):
        if cell.uuid == own:
            continue
        if database is not None and cell.database_connection == database:
            raise Conflict("cell.shared_database", f"{cell.name} has this database already")
        if transport is not None and cell.transport_url == transport and not transport.reveal().startswith("none:"):
            raise Conflict("cell.shared_transport", f"{cell.name} has this message queue already")


def _print_one(record: dict[str, Any], form: Format) -> None:
    if form == Format.TABLE:
        for key in COLUMNS:
            print(f"{key:<11}{record[key]}")
    elif form == Format.JSON:
        print(json.dumps({"schema": "cellway.cell.show/1", "item": record}))
    else:
        print_records("cell.show", [record], COLUMNS, form)


async def _read(config: Path | None, data: Path | None, function: Any, *args: Any) -> Any:
    async with opened(config, data) as application:
        return await application.databases.on(API).read(function, *args)


async def _write(config: Path | None, data: Path | None, function: Any) -> Any:
    async with opened(config, data) as application:
        return await application.databases.on(API).write_once(None, function)
