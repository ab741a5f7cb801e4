"""`cellway agent`: the process of one host. It knows its cell's queue, and no database."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cellway.app import Application
from cellway.cli.output import Format, FormatOption, LogLevel, LogLevelOption
from cellway.cli.process import CellOption, ConfigOption, Ready, own_queue, read_config, run, until_answered
from cellway.config import Secret
from cellway.errors import Invalid
from cellway.operations.embedded import hold

app = typer.Typer(rich_markup_mode=None)

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@app.command()
def agent(
    cell: CellOption,
    host: Annotated[str, typer.Option("--host", help="Name of this host, which no other host of any cell has.")],
    config: ConfigOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
    form: FormatOption = Format.TABLE,
) -> None:
    """Run the servers of one host (simulated ones)."""
    if not _HOST.fullmatch(host):
        raise Invalid("agent.bad_host", "--host is made of letters, digits, and . _ - after the first, 255 at most")
    loaded = read_config("agent", config)
    queue = own_queue(loaded)
    folder = loaded.agent.state_folder
    journal = Path(folder) / f"{host}.journal" if folder else None
    # Two agents that shared a journal would each lose what the other wrote.
    lock = hold(journal.with_suffix(".lock"), "agent.in_use", f"host {host}") if journal else None
    try:
        run("agent", loaded, partial(_drive, cell, host, queue, journal), log_level=log_level, form=form)
    finally:
        if lock is not None:
            os.close(lock)


async def _drive(
    cell: str, host: str, queue: Secret, journal: Path | None, application: Application, ready: Ready
) -> None:
    start = partial(application.start_agent, host, queue, application.config.agent, journal=journal)
    started = await until_answered(start)
    ready(cell=cell, host=host)
    await started.wait()
