"""The quota part of `make soak`: a million reservations, commits, refunds and recounts while processes are killed.

Worker processes use the noun as the verbs do, over a proxy before the API database. They are killed with -9 and started
again, answers to their COMMITs are cut, and limits change meanwhile. Whoever is granted something looks, in the same
transaction, whether it passed the limit in force. At the end every usage must be what a recount gives, and zero once
every charge is given back.
"""

import argparse
import asyncio
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import sqlalchemy as sa
import structlog

from cellway.config import Limits, QuotaSection, Secret
from cellway.context import SystemClock
from cellway.db.api_tables import quota_usages, reservations, server_charges
from cellway.db.engines import Database
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import OverQuota, Unavailable
from cellway.quota import limits, usage
from cellway.quota.limits import Allowed
from cellway.quota.usage import Charge, Uncounted, Usage
from tests.databases import empty_database, engine_of, upgraded
from tests.proxy import Proxy, opened

OPERATIONS: Final = 1_000_000
WORKERS: Final = 3
CALLERS: Final = 4
PROJECTS: Final = ("p1", "p2", "p3")
USERS: Final = ("alice", "Bob")
HOLD_SECONDS: Final = 3
DEFAULTS: Final = limits.defaults_of(QuotaSection(instances=20, cores=30, ram=-1))
HEAD: Final = "| Operations | Broken meanwhile | Seen |\n|---|---|---|\n"
REPORT_EVERY: Final = 50


class Overrun(Exception):
    """A limit was passed."""


# ---- a worker --------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """Does random things to the usages for ever, and prints a line for every so many."""

    api: Database[ApiTx]
    dice: random.Random
    done: int = 0

    async def work(self) -> None:
        """Do one thing after another. What an outage cut off is left as it is, as a killed process leaves it."""
        servers: list[str] = []
        holds: list[str] = []
        while True:
            try:
                with suppress(OverQuota):
                    await self._one(servers, holds)
            except Uncounted as error:
                await self._quietly(error)
            except Unavailable:
                await asyncio.sleep(0.01)
            self.done += 1
            if self.done % REPORT_EVERY == 0:
                print(REPORT_EVERY, flush=True)

    async def _quietly(self, missing: Uncounted) -> None:
        try:
            await self.api.write(usage.refresh, missing.project_id, [missing.user_id])
        except Unavailable:
            await asyncio.sleep(0.01)

    async def _one(self, servers: list[str], holds: list[str]) -> None:
        dice, write = self.dice, self.api.write_once
        project, user = dice.choice(PROJECTS), dice.choice(USERS)
        match dice.choices(range(8), (30, 20, 5, 25, 8, 8, 2, 2))[0]:
            case 0:
                await self._accept(project, user, servers)
            case 1 if servers:
                await write(None, usage.commit, dice.choice(servers))
            case 2 if servers:
                await write(None, usage.refund, dice.choice(servers), keep=True)
            case 3 if servers:
                await write(None, usage.refund, servers.pop(dice.randrange(len(servers))))
            case 4:
                await self._hold(project, user, holds)
            case 5 if holds:
                await write(None, usage.rollback, holds.pop(dice.randrange(len(holds))))
            case 6:
                for late in await self.api.read(usage.list_expired, 100):
                    await write(None, usage.rollback, late)
            case 7:
                await self._change_limits(project, user)
            case _:
                await self.api.write(usage.refresh, project, None)

    async def _accept(self, project: str, user: str, servers: list[str]) -> None:
        cores, count = self.dice.randint(0, 3), self.dice.randint(1, 2)
        charges = [Charge(str(uuid.uuid4()), project, user, cores, 1) for _ in range(count)]

        def accept(tx: ApiTx) -> None:
            usage.reserve_servers(tx, charges, lambda: limits.allowed(tx, DEFAULTS, project, user))
            _check(tx, project, user, ("instances", *(["cores"] if cores else [])))

        await self.api.write_once(lambda tx: usage.is_reserved(tx, charges[0].instance_uuid), accept)
        servers += [one.instance_uuid for one in charges]

    async def _hold(self, project: str, user: str, holds: list[str]) -> None:
        number = str(uuid.uuid4())

        def hold(tx: ApiTx) -> None:
            expires = tx.now + timedelta(seconds=HOLD_SECONDS)

            def allowed() -> Allowed:
                return limits.allowed(tx, DEFAULTS, project, user)

            usage.reserve(tx, number, project, user, {"cores": 1}, allowed, expires_at=expires)
            _check(tx, project, user, ("cores",))

        await self.api.write_once(lambda tx: usage.is_reserved(tx, number), hold)
        holds.append(number)

    async def _change_limits(self, project: str, user: str) -> None:
        wanted = {"instances": self.dice.randint(5, 20), "cores": self.dice.randint(5, 30)}

        def change(tx: ApiTx) -> None:
            match self.dice.randrange(4):
                case 0:
                    limits.set_project(tx, project, wanted)
                case 1:
                    limits.set_user(tx, project, user, wanted)
                case 2:
                    limits.delete_user(tx, project, user)
                case _:
                    limits.delete_project(tx, project)
            usage.lock(tx, project, "", usage.SERVER)

        await self.api.write_once(None, change)


def _check(tx: ApiTx, project: str, user: str, resources: tuple[str, ...]) -> None:
    """Look whether what was granted just now passed a limit; nobody else can change either meanwhile."""
    allowed = limits.allowed(tx, DEFAULTS, project, user)
    for scope, most in (("", allowed.project), (user, allowed.user)):
        for resource, used in usage.find(tx, project, scope).items():
            if resource in resources and 0 <= most[resource] < used.total:
                raise Overrun(f"{project} {scope} {resource}: {used} of {most[resource]}")


async def _work(url: Secret, seed: int) -> None:
    room = Limits(database_threads=CALLERS, database_deadline_seconds=20.0)
    worker = Worker(Database(url, ApiTx, cell=None, limits=room, clock=SystemClock()), random.Random(seed))
    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(worker.work())


# ---- what breaks them ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The workers of one run, and how many operations they have reported."""

    url: Secret
    dice: random.Random
    operations: int = 0

    def start(self) -> "subprocess.Popen[str]":
        """Start a worker, whose reports are counted in a thread."""
        command = [sys.executable, "-m", "tests.quota_soak", "--worker", str(self.dice.randrange(2**31))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        # Not on the command line: it may hold a password.
        process.stdin.write(self.url.reveal() + "\n")
        process.stdin.close()
        threading.Thread(target=self._count, args=(process,), daemon=True).start()
        return process

    def _count(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as reports:
            for report in reports:
                self.operations += int(report)


def soak(kind: str, operations: int, seed: int) -> tuple[str, str, str]:
    """Run so many operations on a database of that kind; return a row of the table."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="cellway-soak-") as folder, empty_database(kind, Path(folder)) as database:
        url = upgraded(database, Tree.API)
        parsed = sa.make_url(url.reveal())
        assert parsed.port is not None
        with opened(parsed.port) as way:
            began = time.monotonic()
            behind = Secret(parsed.set(port=way.port).render_as_string(hide_password=False))
            broken, wrong, done = _break(Run(behind, dice), way, operations, dice)
            seconds = time.monotonic() - began
            way.heal()
        left = _audit(url)
    held = f"no limit was passed, and every usage was its recount; {left}"
    return (
        f"{done:,} in {seconds / 60:.0f} min by {WORKERS} processes with {CALLERS} callers each; seed {seed}",
        ", ".join(f"{count} × {what}" for what, count in sorted(broken.items())),
        "; ".join(wrong) or held,
    )


def _break(run: Run, way: Proxy, operations: int, dice: random.Random) -> tuple[Counter[str], list[str], int]:
    broken: Counter[str] = Counter()
    wrong: list[str] = []
    workers = [run.start() for _ in range(WORKERS)]
    said = time.monotonic()
    while run.operations < operations and not wrong:
        time.sleep(dice.uniform(0.5, 2.0))
        if dice.random() < 0.5:
            number = dice.randrange(WORKERS)
            workers[number].kill()
            workers[number].wait()
            workers[number] = run.start()
            broken["kill -9"] += 1
        else:
            before = way.cuts
            way.cut(rb"COMMIT\b", times=dice.randint(1, 10))
            time.sleep(0.3)
            way.heal()
            broken["COMMIT cut"] += way.cuts - before
        wrong += [f"a worker ended with {worker.poll()}" for worker in workers if worker.poll() is not None]
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"  {run.operations:,} operations", file=sys.stderr, flush=True)
    for worker in workers:
        worker.kill()
        worker.wait()
    return broken, wrong, run.operations


def _audit(url: Secret) -> str:
    """Let what was held expire, recount, and give every charge back. Raises: AssertionError."""
    engine = engine_of(url)
    try:
        with engine.begin() as connection:
            tx = ApiTx(connection, SystemClock().now() + timedelta(days=1))
            expired = usage.list_expired(tx, 10**6)
            for late in expired:
                assert usage.rollback(tx, late)
            charged = set(tx.execute(sa.select(server_charges.c.instance_uuid)).scalars())
            assert set(tx.execute(sa.select(reservations.c.uuid)).scalars()) <= charged
            for project in PROJECTS:
                counted, stands = usage.count(tx, project), usage.list_of(tx, project)
                assert stands == {key: counted.get(key, Usage()) for key in stands}, (project, stands, counted)
                assert counted.keys() <= stands.keys()
            for server in charged:
                assert usage.refund(tx, server)
            for project in PROJECTS:
                usage.refresh(tx, project, None)
            left = {Usage(row.in_use, row.reserved) for row in tx.execute(sa.select(quota_usages))}
            assert left == {Usage()}, left
            assert tx.execute(sa.select(reservations)).all() == []
    finally:
        engine.dispose()
    return f"at the end {len(charged)} servers were charged, {len(expired)} reservations had expired"


def main() -> int:
    """Run as the command line says, and write the row when asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.quota_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--database", choices=("postgresql", "mariadb"), default="postgresql")
    parser.add_argument("--operations", type=int, default=OPERATIONS, metavar="N")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the row into this database's table in FILE")
    parser.add_argument("--worker", type=int, metavar="SEED", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker is not None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        asyncio.run(_work(Secret(sys.stdin.readline().strip()), chosen.worker))
        return 0
    print(f"quota: seed {chosen.seed}", file=sys.stderr)
    row = soak(chosen.database, chosen.operations, chosen.seed)
    print("\n".join(f"  {cell}" for cell in row), flush=True)
    if chosen.write is not None:
        text = chosen.write.read_text()
        begin, end = f"<!-- quota {chosen.database} -->\n", f"<!-- end of quota {chosen.database} -->"
        before, _, rest = text.partition(begin)
        chosen.write.write_text(f"{before}{begin}{HEAD}| {' | '.join(row)} |\n{end}{rest.partition(end)[2]}")
    return int("no limit was passed" not in row[2])


if __name__ == "__main__":
    sys.exit(main())
