"""Online data migrations: rows per second out of the cells, in batches of several sizes.

`python -m benchmarks --migration` calls `measure`. The limits of both cells are the same keys, and two in three
disagree, which is the dear case: they are read, compared by the rule and written again.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import msgspec
import sqlalchemy as sa

from benchmarks.operations import Place
from cellway import online_migrations
from cellway.config import Limits
from cellway.context import service_context
from cellway.db import api_tables, cell_tables
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.ids import RequestId
from cellway.online_migrations import Options
from cellway.quota.moving import Rule
from cellway.testing import Deployment, deployment

BATCHES = (50, 500, 2000)
"""The incumbent's, ours, and a larger one."""
ROWS = 3000
"""In each of two cells."""
_CONTEXT = service_context(RequestId("req-bench"))
_PATIENT = Limits(database_deadline_seconds=60)


class Row(msgspec.Struct):
    """What was measured with one size of batch; a figure for each round."""

    batch: int
    seconds: list[float] = []
    microseconds: list[float] = []
    """Of this process's CPU, for each row."""


async def measure(place: Place, rounds: int) -> list[Row]:
    """Migrate in batches of every size in every round, after one that is thrown away."""
    rows = [Row(batch) for batch in BATCHES]
    for number in range(rounds + 1):
        for row in rows:
            limits = replace(_PATIENT, migration_batch=row.batch)
            async with deployment(
                place.folder, databases=place.databases, hosts_per_cell=1, builder=False, limits=limits
            ) as running:
                seconds, microseconds = await _migrate(running)
            if number:
                row.seconds.append(round(seconds, 3))
                row.microseconds.append(round(microseconds, 1))
    return rows


async def _migrate(running: Deployment) -> tuple[float, float]:
    await running.app.databases.on(API).write(_clear)
    for cell, value in (("cell1", 10), ("cell2", 20)):
        with running.targeted(cell) as cctx:
            await running.app.databases.on(cctx).write(_fill, value)
    began, began_cpu = time.perf_counter(), time.process_time()
    report = await online_migrations.run(running.app.cells, _CONTEXT, running.app.clock, Options(rule=Rule.HIGHEST))
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    if report.done != 2 * ROWS or report.problems:
        raise RuntimeError(f"{report.done} of {2 * ROWS} rows were moved: {report.problems}")
    return seconds, cpu / report.done * 1e6


def _clear(tx: ApiTx) -> None:
    for table in (api_tables.quotas, api_tables.migrated_keys):
        tx.execute(sa.delete(table))


def _fill(tx: CellTx, value: int) -> None:
    tx.execute(sa.delete(cell_tables.quotas))
    tx.execute(
        sa.insert(cell_tables.quotas),
        [
            {
                "project_id": f"{number // 3:032x}",
                "resource": ("cores", "ram", "instances")[number % 3],
                "hard_limit": value if number % 3 else number,
                "deleted": 0,
            }
            for number in range(ROWS)
        ],
    )


def table(rows: Sequence[Row]) -> str:
    """Return the figures as a table."""
    head = (
        f"{'Limits out of 2 cells':24}{'rows per second':>20}{'CPU µs per row':>20}\n"
        f"{'':24}{'max':>10}{'median':>10}{'min':>10}{'median':>10}\n"
    )
    return head + "\n".join(map(_line, rows))


def _line(row: Row) -> str:
    per_second = [2 * ROWS / seconds for seconds in row.seconds]
    cpu = f"{min(row.microseconds):10.0f}{median(row.microseconds):10.0f}"
    return f"{f'batches of {row.batch}':24}{max(per_second):10.0f}{median(per_second):10.0f}{cpu}"


def how(rows: Sequence[Row], kind: str) -> str:
    """Say how it was measured."""
    server = "" if kind == "SQLite" else "\nThe database server's CPU is not counted."
    return (
        f"{len(rows[0].seconds)} rounds of all sizes in turn, after one to warm up, on {kind}: 2 cells of {ROWS}\n"
        f"limits each, all of the same projects and resources; two in three disagree, and the highest stands.{server}"
    )
