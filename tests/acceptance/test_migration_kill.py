"""`kill -9` of the command that moves limits, two of them at once, while the API changes limits (M1, M2, M3, L8)."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest

from cellway.quota.moving import Rule
from tests.acceptance.migration_trial import BLOCKED, CELLS, Trial, torment, trial
from tests.databases import SLOW_SERVERS


def check(running: Trial) -> None:
    """What came out is what the rule says, nothing was ever nowhere, and only what cannot be moved is left."""
    assert running.lost == []
    assert running.result() == running.expected()
    assert running.left() == BLOCKED * len(CELLS)
    assert running.said == {3: 1}


@pytest.mark.parametrize("kind", SLOW_SERVERS)
def test_a_run_that_is_left_alone_gives_what_the_rule_says(kind: str, tmp_path: Path) -> None:
    """One undisturbed run, which the others are compared with through the same model."""
    with trial(kind, tmp_path, rule=Rule.KEEP, seed=1, rows_per_cell=300) as running:
        running.change_over_api(5)
        torment(running, kills=0, seconds=0, batch=50)
        check(running)


@pytest.mark.parametrize("kind", SLOW_SERVERS)
def test_runs_that_are_killed_give_the_same(kind: str, tmp_path: Path) -> None:
    """Two runs at once, killed at random moments four times, then one that is not."""
    with trial(kind, tmp_path, rule=Rule.LOWEST, seed=2, rows_per_cell=2000) as running:
        torment(running, kills=4, seconds=0.3, batch=10)
        assert running.at_work > 4
        check(running)


def test_runs_at_once_all_come_to_their_end(tmp_path: Path) -> None:
    """Of three runs that nobody disturbs each ends as one alone does, and every row is moved once."""
    with trial("sqlite", tmp_path, rule=Rule.HIGHEST, seed=6, rows_per_cell=500) as running:
        processes = [running.start(batch=10, output=subprocess.PIPE) for _ in range(3)]
        documents = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
        running.said.update(process.returncode for process in processes)
        assert running.said == {3: 3}
        assert sum(total["done"] for one in documents for total in one["totals"]) == running.rows - BLOCKED * len(CELLS)
        assert running.result() == running.expected()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_ends_after_its_batch(tmp_path: Path, number: signal.Signals) -> None:
    """It ends at once, also out of its rest, with 130 and a document of what it did; the next run goes on."""
    with trial("sqlite", tmp_path, rule=Rule.KEEP, seed=4, rows_per_cell=300) as running:
        before = running.left()
        process = running.start("--sleep", "600", batch=50, output=subprocess.PIPE)
        while running.left() == before:
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        document = json.loads(output)
        assert process.returncode == 130
        first = document["items"][1]
        assert (first["cell"], first["found"], first["blocked"]) == ("cell1", 50, BLOCKED)
        assert sum(total["done"] for total in document["totals"]) == 50 - BLOCKED == before - running.left()
        assert first["left"] == 180 + BLOCKED - first["done"]
        torment(running, kills=0, seconds=0, batch=50)
        check(running)


def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    """On a terminal there is a bar on stderr, and stdout has the document alone."""
    with trial("sqlite", tmp_path, rule=Rule.KEEP, seed=5, rows_per_cell=100) as running:
        ours, theirs = pty.openpty()
        shown = bytearray()
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            process = running.start("--sleep", "0.3", batch=50, output=subprocess.PIPE, errors=theirs)
            os.close(theirs)
            # An error is how Linux says that the other end was closed.
            with contextlib.suppress(OSError):
                while chunk := terminal.read(4096):
                    shown += chunk
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 3
        assert json.loads(output)["schema"] == "cellway.db.online-data-migrations/1"
        assert "quotas  cell1 ━" in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())


@pytest.mark.slow
def test_many_rows_killed_often(tmp_path: Path) -> None:
    """Three cells of 20,000 rows each, ten times two runs at once that are killed."""
    with trial("sqlite", tmp_path, rule=Rule.KEEP, seed=3, rows_per_cell=20_000) as running:
        torment(running, kills=10, seconds=0.3, batch=100)
        assert running.at_work > 5
        check(running)
