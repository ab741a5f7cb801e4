"""The files that deploy Cellway fit the program: commands exist, and each process is given what it may know."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cellway.cli.main import app
from cellway.cli.process import own_queue, read_config
from cellway.config import load

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
CONFIGS = sorted((ROOT / "deploy" / "config").glob("*.conf"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
PROGRAM = "/opt/cellway/bin/cellway"
PROCESSES = ("api", "builder", "conductor", "agent")
RUN_BY_COMPOSE = {
    name: service for name, service in COMPOSE["services"].items() if service.get("command", [""])[0] in PROCESSES
}


def parse(arguments: list[str]) -> str:
    """Let the command line read its arguments without running anything; return the command's name."""
    command: Any = typer.main.get_command(app)
    rest = arguments
    while hasattr(command, "get_command"):
        name, *rest = rest
        command = command.get_command(None, name)
        assert command is not None, arguments
    command.make_context(command.name, list(rest))
    return arguments[0]


def test_what_is_no_command_line_is_noticed() -> None:
    """The check below refuses unknown commands and options, and ones that miss what they need."""
    for wrong in (["bilder"], ["builder", "--cell", "c"], ["agent", "--cell", "c"], ["cell", "crate", "x"]):
        with pytest.raises((AssertionError, typer.TyperException)):
            parse(wrong)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_run_commands_that_exist(unit: Path) -> None:
    """Each unit's command line can be read, with the configuration that is there as an example."""
    text = unit.read_text()
    [line] = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    [config] = re.findall(r"^LoadCredential=cellway.conf:/etc/cellway/(.*)$", text, re.MULTILINE)
    program, *arguments = shlex.split(line.replace("%i", "cell1").replace("%d", "/run").replace("%H", "host"))
    assert program == PROGRAM
    read_config(parse(arguments), ROOT / "deploy" / "config" / config.replace("%i", "cell1"))


def test_units_pass_the_check_of_systemd(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about them."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    shared = tmp_path / "cellway-.service.d"
    shared.mkdir()
    for path in (ROOT / "deploy" / "systemd").rglob("*.*"):
        if path.is_file():
            # The program is not installed here.
            text = path.read_text().replace(PROGRAM, "/bin/true")
            (tmp_path / path.relative_to(ROOT / "deploy" / "systemd")).write_text(text)
    names = [str(tmp_path / unit.name.replace("@.", "@cell1.")) for unit in UNITS]
    done = subprocess.run([program, "verify", *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_compose_runs_every_kind_of_process() -> None:
    """Two APIs, a builder, and for each of two cells a conductor and two agents; every command line can be read."""
    commands = [parse(service["command"]) for service in RUN_BY_COMPOSE.values()]
    assert [commands.count(process) for process in PROCESSES] == [2, 1, 2, 4]
    [script] = COMPOSE["services"]["setup"]["command"]
    lines = [line.partition("||")[0].rpartition("|")[2].strip() for line in script.strip().splitlines()]
    assert [parse(shlex.split(line)[1:]) for line in lines] == ["db", "cell", "cell", "cell", "db"]


@pytest.mark.parametrize("name", RUN_BY_COMPOSE)
def test_compose_gives_each_process_what_it_may_know(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment is all that the process needs, and holds nothing that it may not know."""
    process = RUN_BY_COMPOSE[name]["command"][0]
    for variable, text in RUN_BY_COMPOSE[name]["environment"].items():
        monkeypatch.setenv(variable, text)
    config = read_config(process, None)
    if process in ("conductor", "agent"):
        assert own_queue(config)


def test_examples_hold_no_password() -> None:
    """Whoever copies an example has to put a password of their own into it."""
    for path in CONFIGS:
        config = load(path)
        for secret in (config.api_database.connection, config.database.connection, config.default.transport_url):
            assert secret is None or ":PASSWORD@" in secret.reveal()
