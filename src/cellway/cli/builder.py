"""`cellway builder`: a process that carries out accepted builds and deletions. Any number may run side by side."""

import typer

from cellway.app import Application
from cellway.cli.output import Format, FormatOption, LogLevel, LogLevelOption
from cellway.cli.process import ConfigOption, Ready, for_ever, read_config, run, start_cells

app = typer.Typer(rich_markup_mode=None)


@app.command()
def builder(
    config: ConfigOption = None, log_level: LogLevelOption = LogLevel.WARNING, form: FormatOption = Format.TABLE
) -> None:
    """Carry out accepted builds and deletions."""
    run("builder", read_config("builder", config), _build, log_level=log_level, form=form)


async def _build(application: Application, ready: Ready) -> None:
    await start_cells(application)
    application.start_builder()
    ready()
    await for_ever()
