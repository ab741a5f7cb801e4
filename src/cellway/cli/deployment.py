"""Which deployment a command talks to: the options that say so, and its databases, opened for one command.

Commands work on the API database itself, by the configuration of the control host or the data folder of `cellway up`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from cellway.app import Application, open_application
from cellway.cli.output import set_up_logs
from cellway.config import Config, load
from cellway.errors import Invalid, NotFound
from cellway.operations.embedded import DataFolder

ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="CELLWAY_CONFIG", help="Configuration file of the deployment.")
]
DataOption = Annotated[Path | None, typer.Option("--data", envvar="CELLWAY_DATA", help="Data folder of `cellway up`.")]


def read_config(config: Path | None, data: Path | None) -> Config:
    """Return the configuration that the options name, and log warnings alone. Raises: Invalid, NotFound."""
    set_up_logs()
    if data is not None:
        folder = DataFolder(data)
        if folder.read_layout() is None:
            raise NotFound("up.no_folder", f"{data} is not a data folder of cellway up")
        return folder.config(load(folder.config_file if folder.config_file.exists() else None))
    loaded = load(config)
    if loaded.api_database.connection is None:
        raise Invalid("config.no_database", "no deployment is named: there is no [api_database] connection")
    return loaded


@asynccontextmanager
async def opened(config: Path | None, data: Path | None) -> AsyncIterator[Application]:
    """Open the deployment's databases for one command, and read its cells."""
    async with open_application(read_config(config, data)) as application:
        await application.cells.refresh()
        yield application
