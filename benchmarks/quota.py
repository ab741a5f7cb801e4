"""Reservations: a server's limits reserved and committed, by one caller and by many, on one project and on many.

`python -m benchmarks` calls `measure` after the operations. What is measured is the noun behind the door that everybody
uses: two transactions, in the API database's own threads.
"""

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from uuid import uuid4

import msgspec

from benchmarks.operations import Place
from cellway.config import Limits, QuotaSection
from cellway.db.engines import API, Database
from cellway.db.transaction import ApiTx
from cellway.quota import limits, usage
from cellway.testing import deployment

OPERATIONS = 96
"""For each figure."""
MANY = 16

_STILL = Limits(
    database_deadline_seconds=60, registry_refresh_seconds=3600, heartbeat_seconds=3600, fleet_sweep_seconds=3600
)
_DEFAULTS = limits.defaults_of(QuotaSection())
_ASKED = {"instances": 1, "cores": 1, "ram": 1}
_PLENTY = dict.fromkeys(_ASKED, limits.MOST)
_USER = "user"


class Row(msgspec.Struct):
    """What was measured of so many callers on so many projects: a figure for each round."""

    callers: int
    projects: int
    per_second: list[float] = []
    cpu: list[float] = []
    """Microseconds of this process for one reserve and commit."""


async def measure(place: Place, rounds: int) -> list[Row]:
    """Reserve and commit in every round, after one that is thrown away."""
    rows = [Row(callers, projects) for callers in (1, MANY) for projects in (1, MANY)]
    async with deployment(
        place.folder, databases=place.databases, limits=_STILL, cells=1, hosts_per_cell=1, builder=False
    ) as running:
        api = running.app.databases.on(API)
        for project in _projects(MANY):
            await api.write(limits.set_project, project, _PLENTY)
            await api.write(usage.refresh, project, [_USER])
        for number in range(rounds + 1):
            for row in rows:
                per_second, cpu = await _figures(api, row)
                if number:
                    row.per_second.append(round(per_second, 1))
                    row.cpu.append(round(cpu, 1))
    return rows


def _projects(count: int) -> list[str]:
    return [f"project-{number}" for number in range(count)]


async def _figures(api: Database[ApiTx], row: Row) -> tuple[float, float]:
    turns = iter(range(OPERATIONS))
    projects = _projects(row.projects)

    async def work() -> None:
        for turn in turns:
            uuid = str(uuid4())
            await api.write(_reserve, uuid, projects[turn % row.projects])
            await api.write(usage.commit, uuid)

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(row.callers)))
    seconds = time.perf_counter() - began
    return OPERATIONS / seconds, (time.process_time() - cpu) / OPERATIONS * 1e6


def _reserve(tx: ApiTx, uuid: str, project: str) -> None:
    usage.reserve(
        tx, uuid, project, _USER, _ASKED, lambda: limits.allowed(tx, _DEFAULTS, project, _USER), expires_at=None
    )


def table(rows: Sequence[Row]) -> str:
    """Return the figures as a table of at most 100 columns."""
    head = (
        f"{'reserve and commit':34}{'per second':>18}{'CPU µs for each':>20}\n"
        f"{'':34}{'max':>9}{'median':>9}{'min':>11}{'median':>9}\n"
    )
    return head + "\n".join(map(_line, rows))


def _line(row: Row) -> str:
    name = f"{row.callers} at once, on {row.projects} project" + ("s" if row.projects > 1 else "")
    figures = f"{max(row.per_second):9.0f}{median(row.per_second):9.0f}{min(row.cpu):11.0f}{median(row.cpu):9.0f}"
    return f"{name:34}{figures}"


def how(rows: Sequence[Row]) -> str:
    """Say how it was measured."""
    return (
        f"Reservations: {len(rows[0].cpu)} rounds, after one to warm up, of {OPERATIONS} times two transactions:\n"
        "instances, cores and ram of the project and of a user, against limits that are read meanwhile."
    )
