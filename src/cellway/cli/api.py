"""`cellway api`: a process that serves the HTTP API. Any number of them may run side by side."""

import asyncio
import socket
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from cellway.app import Application
from cellway.cli.output import Format, FormatOption, LogLevel, LogLevelOption
from cellway.cli.process import ConfigOption, Ready, read_config, run, start_cells
from cellway.http.server import bind, serving

app = typer.Typer(rich_markup_mode=None)


@app.command()
def api(
    builder: Annotated[
        bool, typer.Option("--builder/--no-builder", help="Carry out builds and deletions too.")
    ] = False,
    config: ConfigOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
    form: FormatOption = Format.TABLE,
) -> None:
    """Serve the HTTP API: compute, identity and images."""
    loaded = read_config("api", config)
    with bind(loaded.api.listen, loaded.api.port) as taken:
        settings = replace(loaded.api, port=taken.getsockname()[1])
        work = partial(_serve, taken, builder)
        run("api", replace(loaded, api=settings), work, log_level=log_level, form=form)


async def _serve(taken: socket.socket, builder: bool, application: Application, ready: Ready) -> None:
    limits = application.config.limits
    port = application.open_port()
    cells = asyncio.create_task(_follow_cells(application, builder))
    try:
        # The API database and then the cells have a deadline each. Without them the port is served all the same, with
        # 503 for what needs them, until they answer.
        await asyncio.wait({cells}, timeout=2 * limits.database_deadline_seconds)
        if cells.done():
            cells.result()
        async with serving(port, taken, limits) as server:
            host, listening = taken.getsockname()[:2]
            ready(api=f"{application.public_endpoint}/compute/v2.1", listen=f"{host}:{listening}")
            await asyncio.wait({server, cells}, return_when=asyncio.FIRST_EXCEPTION)
            if cells.done():
                cells.result()
    finally:
        cells.cancel()


async def _follow_cells(application: Application, builder: bool) -> None:
    await start_cells(application)
    if builder:
        application.start_builder()
