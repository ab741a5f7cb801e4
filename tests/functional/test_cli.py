"""The operator's commands, run as `cellway …` over a data folder with two cells, without a process that serves it."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cellway import __version__
from cellway.config import Config
from cellway.context import SystemClock
from cellway.ids import RandomIds
from cellway.operations.embedded import DataFolder, Layout, prepare
from tests.commands import Result, Run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared data folder."""
    folder = DataFolder(tmp_path / "data")
    folder.path.mkdir(mode=0o700)
    layout = Layout(2, 1, __version__)
    asyncio.run(prepare(folder, folder.config(Config()), layout, clock=SystemClock(), ids=RandomIds()))
    return folder.path


def test_cells_are_listed(run: Run) -> None:
    """`cell list` names every cell with its counts, as a table and as one JSON document."""
    assert [line.split()[0] for line in run("cell", "list").out.splitlines()] == ["NAME", "cell0", "cell1", "cell2"]
    document = run("cell", "list", "--format", "json").json
    assert document["schema"] == "cellway.cell.list/1"
    assert [(item["name"], item["state"], item["hosts"], item["servers"]) for item in document["items"]] == [
        (name, "enabled", 0, 0) for name in ("cell0", "cell1", "cell2")
    ]


def test_a_cell_is_created_shown_changed_and_deleted(run: Run, tmp_path: Path) -> None:
    """A cell's whole life; what an update does not name stays as it was."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    made = run("cell", "create", "new", "--database-url", url, "--transport-url", "memory://new", "-f", "json").json
    assert made["item"]["name"] == "new"
    changed = run("cell", "update", "new", "--disable", "--name", "newer", "-f", "json").json["item"]
    assert (changed["name"], changed["state"], changed["database"]) == ("newer", "disabled", url)
    assert run("cell", "show", "newer", "-f", "json").json["item"] == changed
    assert run("cell", "delete", changed["uuid"]).status == 0
    assert run("cell", "show", "newer").status == 3


def test_passwords_are_never_shown(run: Run) -> None:
    """Each host's password of a URL is masked, and those among its parameters, in every format."""
    secret = "s3cret%2Fpass"
    url = f"mysql+pymysql://user:{secret}@db1:3306,user:{secret}@db2:3306/cell?ssl_key=/etc/key&password={secret}"
    answers = [
        run("cell", "create", "prod", "--database-url", url, "--transport-url", "memory://prod"),
        *(run("cell", "list", "--format", form) for form in ("table", "json", "value", "csv")),
        run("cell", "show", "prod"),
    ]
    assert all(answer.status == 0 for answer in answers)
    assert all(secret not in answer.out + answer.err for answer in answers)
    assert "mysql+pymysql://user:***@db1:3306,user:***@db2:3306/cell?ssl_key=***&password=***" in answers[-1].out


def test_what_is_refused_says_why_and_what_to_do(run: Run, tmp_path: Path) -> None:
    """Each refusal has its exit status, a sentence, and its dotted code; with JSON asked for also one document."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    cases = [
        (("cell", "show", "nowhere"), 3, "cell.not_found"),
        (("cell", "create", "cell1", "--database-url", url, "--transport-url", "memory://x"), 5, "cell.exists"),
        (("cell", "create", "x", "--database-url", url), 2, "cell.incomplete"),
        (("cell", "create", "x", "--database-url", "oracle://x", "--transport-url", "none:///"), 2, "cell.bad_url"),
        (
            ("cell", "create", "x", "--database-url", url, "--transport-url", "memory://cell1"),
            5,
            "cell.shared_transport",
        ),
        (("cell", "delete", "cell0"), 5, "cell.cell0"),
        (("cell", "update", "cell0", "--disable"), 5, "cell.cell0"),
        (("db", "status", "nowhere"), 3, "cell.not_found"),
    ]
    for arguments, status, code in cases:
        answer = run(*arguments)
        assert (answer.status, answer.out) == (status, ""), arguments
        assert answer.err.startswith("error: ")
        assert f"code: {code}" in answer.err
        assert run(*arguments, "--format", "json").json["error"]["code"] == code if arguments[1] != "delete" else True


def test_a_wrong_command_names_the_nearest(run: Run) -> None:
    """A misspelt command or option is a usage error that says what was meant."""
    misspelt = run("cel", "list")
    assert misspelt.status == 2
    assert "did you mean cell?" in misspelt.err
    assert run("cell", "list", "--formt", "json").status == 2


def test_a_deployment_has_to_be_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a configuration or a folder a command says how to name one, and makes nothing."""
    monkeypatch.delenv("CELLWAY_DATA")
    assert "code: config.no_database" in run("cell", "list").err
    assert run("cell", "list", "--data", str(tmp_path / "nothing")).status == 3
    assert not (tmp_path / "nothing").exists()


def test_schemas_are_synced_and_compared(run: Run, data: Path, tmp_path: Path) -> None:
    """`db status` finds a cell without a schema (8), `db sync` makes it, and twice changes nothing."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    run("cell", "create", "new", "--database-url", url, "--transport-url", "memory://new")
    before = run("db", "status", "-f", "json")
    assert before.status == 8
    assert [item["database"] for item in before.json["items"] if item["state"] != "ok"] == ["new"]
    synced = run("db", "sync", "new", "-f", "json")
    assert [(item["database"], item["state"]) for item in synced.json["items"]] == [("new", "upgraded")]
    assert run("db", "status").status == 0
    assert {item["state"] for item in run("db", "sync", "-f", "json").json["items"]} == {"ok"}
    (data / "cell2.db").write_bytes(b"not a database at all, but long enough to be taken for a damaged one" * 20)
    damaged = run("db", "status", "-f", "json")
    assert damaged.status == 8
    assert [item["database"] for item in damaged.json["items"] if item["state"] == "problem"] == ["cell2"]


def test_hosts_are_asked_of_every_cell(run: Run, data: Path) -> None:
    """`host list` has no hosts before any registered; a cell that does not answer is named and makes it 6."""
    assert run("host", "list", "-f", "json").json["items"] == []
    assert run("host", "discover").out == "0 hosts mapped\n"
    (data / "cell2.db").unlink()
    answer = run("host", "list", "-f", "json")
    assert (answer.status, [missing["cell"] for missing in answer.json["partial"]]) == (6, ["cell2"])


# ---- online data migrations ------------------------------------------------------------------------------------


def fill(data: Path, cell: str, *rows: tuple[str | None, str, int | None]) -> None:
    """Put limits of projects into a cell's own table."""
    insert = "INSERT INTO quotas (project_id, resource, hard_limit, deleted) VALUES (?, ?, ?, 0)"
    with closing(sqlite3.connect(data / f"{cell}.db")) as connection, connection:
        connection.executemany(insert, rows)


def items(answer: Result) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the records of a migration's document, by migration and cell."""
    return {(item["migration"], item["cell"]): item for item in answer.json["items"]}


MIGRATE = ("db", "online-data-migrations")


def test_a_migration_ends_with_0_and_says_what_it_did(run: Run, data: Path) -> None:
    """Totals for each migration and cell, every difference, and what nobody knows; then all is complete."""
    fill(data, "cell1", ("p", "cores", 10), ("p", "gpus", 1))
    fill(data, "cell2", ("p", "cores", 20), ("\x1b[2J", "ram", 5))
    dry = run(*MIGRATE, "--dry-run")
    assert dry.status == 0
    assert "quotas  cell2  row 1  p/cores: 20 kept, 10 stands" in dry.out
    assert "nothing was written" in dry.err
    assert "p/cores" in run(*MIGRATE, "--dry-run", "-f", "json").err
    answer = run(*MIGRATE)
    assert (answer.status, answer.out) == (0, dry.out)
    assert "cell1: 1 rows of gpus, which is not known" in answer.err
    assert "\x1b" not in answer.out
    again = run(*MIGRATE, "--format", "json")
    assert again.status == 0
    assert again.json["schema"] == "cellway.db.online-data-migrations/1"
    assert [total["done"] for total in again.json["totals"]] == [0, 0, 0]
    status = items(run("db", "migrations", "status", "-f", "json"))
    assert {one["state"] for one in status.values()} == {"complete"}
    assert {key[1]: one["done"] for key, one in status.items() if key[0] == "quotas"} == {
        "cell0": 0,
        "cell1": 2,
        "cell2": 2,
    }


def test_a_migration_with_a_count_ends_with_1_while_more_remains(run: Run, data: Path) -> None:
    """The incumbent's loop, again while the status is 1, comes to its end."""
    fill(data, "cell1", *((f"p{number}", "cores", number) for number in range(5)))
    assert [run(*MIGRATE, "--max-count", "2").status for _ in range(4)] == [1, 1, 0, 0]


def test_rows_that_cannot_be_moved_make_it_3(run: Run, data: Path) -> None:
    """They are listed with the reason, in text and in JSON, also by a dry run; a conflict under `fail` is one."""
    fill(data, "cell1", (None, "cores", 10), ("p", "ram", 1))
    fill(data, "cell2", ("p", "ram", 2))
    for options in (("--dry-run",), ()):
        answer = run(*MIGRATE, "--on-conflict", "fail", *options)
        assert answer.status == 3
        assert "quotas  cell1  row 1  NULL/cores: 10 blocked: project_id is NULL" in answer.out
        assert "quotas  cell2  row 1  p/ram: 2 blocked, 1 stands: another cell has another value" in answer.out
    document = run(*MIGRATE, "--on-conflict", "fail", "-f", "json").json
    assert [(one["cell"], one["key"], one["reason"]) for one in document["blocked"]] == [
        ("cell1", "NULL/cores", "project_id is NULL"),
        ("cell2", "p/ram", "another cell has another value"),
    ]
    answer = run(*MIGRATE, "--on-conflict", "lowest")
    assert answer.status == 3
    assert "p/ram: 2 kept, 1 stands" in answer.out
    status = items(run("db", "migrations", "status", "-f", "json"))
    assert {cell: status["quotas", cell]["state"] for cell in ("cell1", "cell2")} == {
        "cell1": "blocked",
        "cell2": "complete",
    }


def test_a_cell_that_does_not_answer_makes_it_2(run: Run, data: Path) -> None:
    """The others are migrated and the cell is named; with a count it is 1 as long as something was done."""
    fill(data, "cell1", ("p", "cores", 10), ("p", "ram", 1))
    (data / "cell2.db").rename(data / "away.db")
    assert [run(*MIGRATE, "--max-count", "1").status for _ in range(3)] == [1, 1, 2]
    answer = run(*MIGRATE, "-f", "json")
    assert answer.status == 2
    assert {missing["cell"] for missing in answer.json["partial"]} == {"cell2"}
    assert "warning: quotas: cell2 is not finished" in answer.err
    assert run("db", "migrations", "status").status == 6
    (data / "away.db").rename(data / "cell2.db")
    assert run(*MIGRATE).status == 0
    (data / "api.db").unlink()
    assert run(*MIGRATE).status == 2


def test_rows_after_completion_are_warned_of(run: Run, data: Path) -> None:
    """`migrations status` ends with 8 and says what to do; the run that moves them says so too."""
    run(*MIGRATE)
    assert run("db", "migrations", "status").status == 0
    fill(data, "cell2", ("p", "cores", 10))
    answer = run("db", "migrations", "status")
    assert answer.status == 8
    assert "rows have appeared in cell2" in answer.err
    answer = run(*MIGRATE)
    assert answer.status == 0
    assert "warning: quotas: cell2 had rows" in answer.err
    assert run("db", "migrations", "status").status == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-count", "0"),
        ("--max-count", "-5"),
        ("--max-count", "many"),
        ("--on-conflict", "newest"),
        ("--sleep", "nan"),
        ("--sleep", "-1"),
        ("--cell", "nowhere"),
        ("--formt", "json"),
        ("cell1",),
    ],
)
def test_a_migration_that_is_called_wrongly_ends_with_127(run: Run, wrong: tuple[str, ...]) -> None:
    """Every wrong argument has the incumbent's status, because 2 means that the migration failed."""
    answer = run(*MIGRATE, *wrong)
    assert (answer.status, answer.out) == (127, "")
    assert answer.err.startswith("error: ")
