"""`cellway --help` is quick: what a command needs is imported when that command runs."""

import subprocess
import sys

import pytest

HEAVY = (
    *("aio_pika", "alembic", "keystoneauth1", "openstack", "oslo_policy", "rich", "sqlalchemy", "starlette"),
    "uvicorn",
)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_the_command_line_starts_without_the_heavy_libraries(arguments: list[str]) -> None:
    """Neither importing the command line nor asking it for help loads a database, HTTP or table library."""
    program = f"""
import sys
from cellway.cli.main import main
if {arguments!r}:
    sys.argv = ["cellway", *{arguments!r}]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.parametrize("module", ["cellway.cli.cell", "cellway.app"])
def test_the_broker_library_is_loaded_by_who_speaks_to_a_broker(module: str) -> None:
    """Neither the commands on cells nor an application without a `rabbit://` URL load it."""
    program = f"import sys, {module}; sys.exit('aio_pika' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
