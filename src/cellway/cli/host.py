"""`cellway host`: the hosts of a deployment, and mapping new ones."""

import asyncio
from pathlib import Path
from typing import Any

import typer

from cellway.cells.scatter import Answered, gather
from cellway.cli.deployment import ConfigOption, DataOption, opened
from cellway.cli.output import Format, FormatOption, note, print_records
from cellway.context import CellContext, service_context
from cellway.hosts import HostRow, list_rows
from cellway.ids import RequestId

app = typer.Typer(help="List hosts and map new ones.", no_args_is_help=True, rich_markup_mode=None)

COLUMNS = ("host", "cell", "state", "status", "mapped", "vcpus", "memory_mb", "disk_gb", "running", "last_seen")


@app.command("list")
def list_(config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE) -> None:
    """List every host, asking each cell; a cell that does not answer is named, and the exit status is 6."""
    records, partial = asyncio.run(_list(config, data))
    print_records("host.list", records, COLUMNS, form, partial=partial)
    for missing in partial:
        note(f"warning: {missing['cell']} did not answer")
    if partial:
        raise typer.Exit(6)


@app.command()
def discover(config: ConfigOption = None, data: DataOption = None, form: FormatOption = Format.TABLE) -> None:
    """Map hosts that have registered in their cells and are not mapped yet; running processes do this by themselves."""
    mapped = asyncio.run(_discover(config, data))
    if form == Format.JSON:
        print_records("host.discover", [{"mapped": mapped}], ("mapped",), form)
    else:
        print(f"{mapped} hosts mapped")


async def _list(config: Path | None, data: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    async with opened(config, data) as application:
        context = service_context(RequestId("cellway-host-list"))
        await application.fleet.reload()
        mapped = {state.host: state.cell_id for state in application.fleet.states()}
        limit = application.config.limits.host_down_seconds

        async def ask(_cell: object, cctx: CellContext) -> tuple[Any, list[HostRow]]:
            return await application.databases.on(cctx).read(lambda tx: (tx.now, list_rows(tx)))

        records: list[dict[str, Any]] = []
        partial: list[dict[str, Any]] = []
        outcomes = await gather(application.cells, context, application.cells.snapshot.with_hosts, ask)
        for cell, outcome in outcomes.items():
            if not isinstance(outcome, Answered):
                partial.append({"cell": cell.ref.name, "reason": type(outcome).__name__})
                continue
            now, rows = outcome.value
            for row in rows:
                silent = (now - row.last_seen_up).total_seconds() if row.last_seen_up else None
                up = silent is not None and silent <= limit and not row.forced_down
                records.append(
                    {
                        "host": row.host,
                        "cell": cell.ref.name,
                        "state": "up" if up else "down",
                        "status": "disabled" if row.disabled else "enabled",
                        "mapped": mapped.get(row.host) == cell.id,
                        "vcpus": row.vcpus,
                        "memory_mb": row.memory_mb,
                        "disk_gb": row.local_gb,
                        "running": row.running_vms,
                        "last_seen": row.last_seen_up.isoformat(timespec="seconds") if row.last_seen_up else None,
                    }
                )
        return records, partial


async def _discover(config: Path | None, data: Path | None) -> int:
    async with opened(config, data) as application:
        return await application.fleet.sweep(service_context(RequestId("cellway-host-discover")))
