"""`cellway up`: the whole control plane in one process over a data folder, for a laptop and for trying things."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from cellway import __version__
from cellway.app import Application, open_application
from cellway.cli import process
from cellway.cli.output import Format, FormatOption, LogLevel, LogLevelOption, set_up_logs
from cellway.config import Config, load
from cellway.context import SystemClock
from cellway.errors import Conflict
from cellway.http.microversions import LATEST, OLDEST, text
from cellway.http.server import bind, serving
from cellway.ids import RandomIds
from cellway.operations.embedded import DataFolder, Layout, prepare

app = typer.Typer(rich_markup_mode=None)

MOST_CELLS = 100
MOST_HOSTS = 1000

CellsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_CELLS, help="Cells with hosts, beside cell0; else as before, or 3.")
]
HostsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_HOSTS, help="Simulated hosts in each cell; else as before, or 4.")
]
ListenOption = Annotated[
    str | None, typer.Option(help="Address to listen on; only this machine unless told otherwise.")
]
PortOption = Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the API; 0 takes a free one.")]


@dataclass(frozen=True, slots=True)
class Running:
    """An embedded deployment that serves."""

    application: Application
    folder: DataFolder
    layout: Layout
    serving: "asyncio.Task[None]"
    before: Layout | None


@asynccontextmanager
async def embedded(
    folder: DataFolder, layout: Layout, *, config: Config | None, listen: str | None, port: int | None
) -> AsyncIterator[Running]:
    """Run an embedded deployment and serve its API for the length of the block.

    The port, the folder and its version are checked before anything is written. Raises: Conflict, Invalid, Unavailable.
    """
    before = folder.read_layout()
    _check_version(folder, before)
    loaded = config or load(folder.config_file if folder.config_file.exists() else None)
    loaded = folder.config(loaded, listen=listen, port=port)
    taken = bind(loaded.api.listen, loaded.api.port)
    with taken:
        loaded = folder.config(loaded, port=taken.getsockname()[1])
        os.umask(0o077)
        lock = folder.lock()
        try:
            await prepare(folder, loaded, layout, clock=SystemClock(), ids=RandomIds())
            async with (
                open_application(loaded) as application,
                _served(application, folder, layout, taken, before) as running,
            ):
                yield running
        finally:
            os.close(lock)


@asynccontextmanager
async def _served(
    application: Application, folder: DataFolder, layout: Layout, taken: socket.socket, before: Layout | None
) -> AsyncIterator[Running]:
    port = application.open_port()
    await application.start_embedded(folder, layout)
    application.start_builder()
    async with serving(port, taken, application.config.limits) as task:
        yield Running(application, folder, layout, task, before)


def _check_version(folder: DataFolder, before: Layout | None) -> None:
    """Raises: Conflict for a folder that a later release wrote."""
    if before is not None and _numbers(before.written_by) > _numbers(__version__):
        raise Conflict(
            "up.later_release",
            f"{folder.path} was written by cellway {before.written_by}; this is {__version__}",
            folder=str(folder.path),
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


async def until_stopped(running: Running) -> None:
    """Wait for SIGINT or SIGTERM, or for the server to end by itself. A second signal ends the process at once."""
    await process.until_signal(running.serving)
    process.note_builds(running.application)


@app.command()
def up(
    cells: CellsOption = None,
    hosts_per_cell: HostsOption = None,
    data: Annotated[Path, typer.Option(envvar="CELLWAY_DATA", help="Folder of the deployment.")] = Path("cellway-data"),
    listen: ListenOption = None,
    port: PortOption = None,
    config: Annotated[Path | None, typer.Option(envvar="CELLWAY_CONFIG", help="Configuration file.")] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
    form: FormatOption = Format.TABLE,
) -> None:
    """Run everything in one process: API, cells, simulated hosts. Ctrl-C stops; the data stays."""
    set_up_logs(log_level, as_json=form == Format.JSON, serving=True)
    folder = DataFolder(data.absolute())
    loaded = load(config) if config is not None else None
    uvloop.run(_up(folder, wanted_layout(folder, cells, hosts_per_cell), loaded, listen, port, form))


def wanted_layout(folder: DataFolder, cells: int | None, hosts_per_cell: int | None) -> Layout:
    """Return the layout to run: what is asked for, else what the folder had, else three cells of four hosts."""
    before = folder.read_layout() or Layout(3, 4, __version__)
    return Layout(cells or before.cells, hosts_per_cell or before.hosts_per_cell, __version__)


async def _up(
    folder: DataFolder, layout: Layout, config: Config | None, listen: str | None, port: int | None, form: Format
) -> None:
    began = time.monotonic()
    servers = 0
    async with embedded(folder, layout, config=config, listen=listen, port=port) as running:
        _announce(running, time.monotonic() - began, form)
        process.notify_ready()
        await until_stopped(running)
        servers = await running.application.count_servers()
    if form == Format.JSON:
        print(json.dumps({"event": "stopped", "servers": servers}), flush=True)
    else:
        print(f"Stopped. {servers} servers kept in {folder.path}.")


def _announce(running: Running, seconds: float, form: Format) -> None:
    application, folder, layout = running.application, running.folder, running.layout
    api = f"{application.public_endpoint}/compute/v2.1"
    if form == Format.JSON:
        ready = {"event": "ready", "api": api, "clouds": str(folder.clouds), "pid": os.getpid()}
        print(json.dumps(ready), flush=True)
        return
    cells = " ".join(cell.ref.name for cell in application.cells.snapshot.all)
    hosts = layout.cells * layout.hosts_per_cell
    print(
        f"cellway {__version__}, one process, not for production\n"
        "\n"
        f"  API       {api}    microversions {text(OLDEST)} to {text(LATEST)}\n"
        f"  Health    {application.public_endpoint}/healthz  /readyz\n"
        f"  Cells     {cells}    {hosts} hosts, simulated\n"
        f"  Data      {folder.path}    {_history(folder, running.before)}\n"
        f"  Clouds    {folder.clouds} (0600)    cellway (member), cellway-admin\n"
        "\n"
        f"Ready in {seconds:.1f} s.\n"
        "\n"
        f"  export OS_CLIENT_CONFIG_FILE={folder.clouds} OS_CLOUD=cellway\n"
        "  openstack server list\n"
        "\n"
        "Ctrl-C stops; the data stays. Warnings follow below (--log-level info for more).",
        flush=True,
    )


def _history(folder: DataFolder, before: Layout | None) -> str:
    if before is None:
        return "new"
    used = datetime.fromtimestamp((folder.path / "api.db").stat().st_mtime, UTC)
    return f"last used {used:%Y-%m-%d %H:%M} UTC"
