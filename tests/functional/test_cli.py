"""The operator's commands, run as `cellway …` over a data folder with two cells, without a process that serves it."""

import asyncio
from pathlib import Path

import pytest

from cellway import __version__
from cellway.config import Config
from cellway.context import SystemClock
from cellway.ids import RandomIds
from cellway.operations.embedded import DataFolder, Layout, prepare
from tests.commands import Run


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
