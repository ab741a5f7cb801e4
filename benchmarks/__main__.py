"""`python -m benchmarks`: CPU microseconds per operation, next to a floor measured in the same run.

Processor time is what the whole server process uses, user and system, all threads; the client runs in another process.
Rounds go through all operations in turn, so that a machine that changes its speed changes it for all of them.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TextIO

import msgspec
import structlog
import uvloop

from benchmarks import migration, quota, rpc
from benchmarks.client import CONNECTIONS
from benchmarks.databases import DATABASES, DRIVERS, NoServer, open_places
from benchmarks.operations import CELLS, HOSTS_PER_CELL, Operation, Place, open_operations, stage

SHOW_GOAL = 3.0
NOVA_GOAL = 30
ROUNDS = 15
FEW_ROUNDS = 5
LEAST_ROUNDS = 3
ENOUGH_SECONDS = 40


class Row(msgspec.Struct):
    """What was measured of one operation, in microseconds; `times` of it make one figure."""

    name: str
    times: int
    nova_microseconds: int | None
    socket: list[float] = []
    inside: list[float] = []
    floor_socket: list[float] = []
    floor_inside: list[float] = []
    floor_driver: list[float] = []

    def floor(self, of: Callable[[Sequence[float]], float]) -> float:
        """Return what the empty handler and the bare driver cost over a socket, by `of` (min or median)."""
        return of(self.floor_socket) + of(self.floor_driver)

    def times_floor(self, of: Callable[[Sequence[float]], float]) -> float:
        """Return how many times the floor our cost is."""
        return of(self.socket) / self.floor(of)

    def times_floor_inside(self) -> float:
        """Return the same without sockets, by the least of each."""
        return min(self.inside) / (min(self.floor_inside) + min(self.floor_driver))


async def measure(operations: Sequence[Operation], rounds: int) -> list[Row]:
    """Run every operation in every round, after one that is thrown away; on a slow machine the rounds are fewer."""
    rows = [Row(one.name, one.times, one.nova_microseconds) for one in operations]
    began = time.monotonic()
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and time.monotonic() - began > ENOUGH_SECONDS:
            break
        for operation, row in zip(operations, rows, strict=True):
            for way in ("socket", "floor_socket", "floor_driver", "inside", "floor_inside") * operation.figures:
                figure = await _cost(operation, way)
                if figure is not None and number:
                    getattr(row, way).append(round(figure, 1))
    return rows


async def _cost(operation: Operation, way: str) -> float | None:
    work = getattr(operation, way)
    if work is None:
        return None
    prepared = work(operation.times) if way == "floor_driver" else None
    began = time.process_time_ns()
    if prepared is not None:
        prepared()
    else:
        await work(operation.times)
    return (time.process_time_ns() - began) / operation.times / 1000


# ---- the report ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the figures as a table of at most 100 columns."""
    head = (
        f"{'CPU µs per operation':21}{'over a socket':>15}{'floor: HTTP + SQL':>21}{'times the floor':>17}"
        f"{'in process':>14}{'Nova':>12}\n"
        f"{'':21}{'min':>7}{'median':>8}{'min':>21}{'min':>9}{'median':>8}{'min':>7}{'times':>7}{'µs':>7}{'less':>5}\n"
    )
    return head + "\n".join(map(_line, rows))


def _line(row: Row) -> str:
    line = f"{row.name:21}{min(row.socket):7.0f}{median(row.socket):8.0f}"
    if row.floor_socket:
        parts = f"{min(row.floor_socket):.0f} + {min(row.floor_driver):.0f} = {row.floor(min):.0f}"
        line += f"{parts:>21}{row.times_floor(min):9.1f}{row.times_floor(median):8.1f}"
        line += f"{min(row.inside):7.0f}{row.times_floor_inside():7.1f}"
    else:
        line += f"{'-':>21}{'-':>9}{'-':>8}{'-':>7}{'-':>7}"
    if row.nova_microseconds is None:
        return line + f"{'-':>7}{'-':>5}"
    return line + f"{row.nova_microseconds:7}{row.nova_microseconds / min(row.socket):5.0f}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return each goal, and whether it is met, by the least of all rounds."""
    goals = []
    for row in rows:
        if row.name == "show":
            goals.append((row.times_floor(min) <= SHOW_GOAL, f"show: at most {SHOW_GOAL:g} times the floor"))
        if row.nova_microseconds is not None:
            met = row.nova_microseconds / min(row.socket) >= NOVA_GOAL
            goals.append((met, f"{row.name}: at least {NOVA_GOAL} times less than Nova"))
    return [f"{'met   ' if met else 'MISSED'}  {goal}" for met, goal in goals]


class Conditions(msgspec.Struct):
    """What else the machine did meanwhile. `stolen` is the share of its processors that others of its host took."""

    seconds: float
    load_before: float
    load_after: float
    stolen: float


def _stolen_seconds() -> float:
    # Only Linux says, and only inside a virtual machine is it ever above 0.
    counters = Path("/proc/stat")
    if not counters.exists():
        return 0.0
    return int(counters.read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


def _how(rows: Sequence[Row], kind: str) -> str:
    rounds = len(rows[-1].socket)
    figures = ", ".join(f"{len(row.socket)} x {row.times}" for row in rows)
    server = "" if kind == "sqlite" else "The database server's CPU is not counted, neither for us nor for the floor.\n"
    return (
        f"{rounds} rounds of all operations in turn, after one to warm up: {figures}, {CONNECTIONS} at once at most.\n"
        f"{CELLS} cells of {HOSTS_PER_CELL} hosts on {DATABASES[kind]}. Ratios to Nova, and goals, are of the min.\n"
        "CPU: user and system time of the server's process, all threads; the client is another process.\n"
        f"{server}"
        f"Floor: an empty Starlette handler with an answer of the same size, and {DRIVERS[kind]} alone with the same\n"
        "statements. In process: without uvicorn and sockets, for us and for the floor."
    )


def _machine(conditions: Conditions) -> str:
    return (
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load average {conditions.load_before:.1f} before, "
        f"{conditions.load_after:.1f} after,\n{conditions.stolen:.0%} of the machine stolen by its host's others, "
        "which counts as ours: it is in the medians."
        f" {conditions.seconds:.0f} s."
    )


async def run(full: Place, accepting: Place, rounds: int) -> list[Row]:
    """Stage the two deployments and measure them."""
    samples = await stage(full, accepting)
    async with open_operations(full, accepting, samples) as operations:
        return await measure(operations, rounds)


def main() -> int:
    """Measure, print the table, and write the figures of every round when asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--database", choices=DATABASES, default="sqlite", help="operations on it (default: sqlite)")
    parser.add_argument("--migration", action="store_true", help="rows out of the cells instead, on that database")
    what.add_argument("--rpc", action="store_true", help="calls and casts instead, in memory and over RabbitMQ")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds that count (default: 15 at most; others: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures to FILE")
    chosen = parser.parse_args()
    rounds = chosen.rounds if chosen.rounds is not None else FEW_ROUNDS if chosen.rpc or chosen.migration else ROUNDS
    if rounds < 1:
        parser.error("--rounds must be 1 at least")
    print("Measuring; this takes up to a minute and a half.", file=sys.stderr)
    began, load, stolen = time.monotonic(), os.getloadavg()[0], _stolen_seconds()
    try:
        rows, text = _measured(chosen.database, chosen.rpc, chosen.migration, rounds)
    except NoServer as error:
        sys.exit(f"error: {error}")
    seconds = time.monotonic() - began
    share = (_stolen_seconds() - stolen) / seconds / (os.cpu_count() or 1)
    conditions = Conditions(round(seconds, 1), load, os.getloadavg()[0], round(share, 3))
    print(text, _machine(conditions), sep="\n")
    if chosen.json is not None:
        report = {"conditions": conditions, "operations": rows}
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return 0


def _measured(
    kind: str, with_rpc: bool, with_migration: bool, rounds: int
) -> tuple[Sequence[Row | rpc.Row | migration.Row | quota.Row], str]:
    """Return what was measured, and the table with what is to be said of it. Raises: NoServer."""
    with (
        tempfile.TemporaryDirectory(prefix="cellway-bench-") as temporary,
        Path(os.devnull).open("w") as nowhere,
        open_places(kind, Path(temporary)) as place,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        _log_to(nowhere)
        if with_rpc:
            messages = runner.run(rpc.measure(rounds))
            return messages, "\n".join((rpc.table(messages), "", rpc.how(messages)))
        if with_migration:
            moved = runner.run(migration.measure(place("migration"), rounds))
            return moved, "\n".join((migration.table(moved), "", migration.how(moved, DATABASES[kind])))
        rows = runner.run(run(place("full"), place("accepting"), rounds))
        granted = runner.run(quota.measure(place("quota"), min(rounds, FEW_ROUNDS)))
        text = (table(rows), "", quota.table(granted), "", *verdicts(rows), "", _how(rows, kind), quota.how(granted))
        return [*rows, *granted], "\n".join(text)


def _log_to(stream: TextIO) -> None:
    """Log as a service does, JSON from INFO on, to where it costs nothing to keep."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    sys.exit(main())
