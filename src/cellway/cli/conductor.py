"""`cellway conductor`: the process of one cell that writes its database on behalf of its agents."""

from functools import partial

import typer

from cellway.app import Application
from cellway.cells.target import OwnCell
from cellway.cli.output import Format, FormatOption, LogLevel, LogLevelOption
from cellway.cli.process import CellOption, ConfigOption, Ready, for_ever, own_queue, read_config, run, until_answered

app = typer.Typer(rich_markup_mode=None)


@app.command()
def conductor(
    cell: CellOption,
    config: ConfigOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
    form: FormatOption = Format.TABLE,
) -> None:
    """Write one cell's database on behalf of its agents."""
    loaded = read_config("conductor", config)
    assert loaded.database.connection is not None
    own = OwnCell.of(cell, loaded.database.connection, own_queue(loaded))
    run("conductor", loaded, partial(_conduct, own), log_level=log_level, form=form)


async def _conduct(own: OwnCell, application: Application, ready: Ready) -> None:
    await until_answered(partial(application.check_cell, own))
    await until_answered(partial(application.start_conductor, lambda: own))
    ready(cell=own.ref.name)
    await for_ever()
