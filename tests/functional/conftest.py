"""What several functional tests need: the command line over a data folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cellway.cli.main import main
from tests.commands import Result, Run


@pytest.fixture
def run(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command on the folder that the test's module calls `data`."""
    monkeypatch.setenv("CELLWAY_DATA", str(data))

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        printed = capsys.readouterr()
        return Result(int(end.value.code or 0), printed.out, printed.err)

    yield run
    structlog.reset_defaults()
