"""Reservations: what is granted never passes a limit, and what is given back is what was taken, once."""

import asyncio
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cellway.config import Limits, QuotaSection, Secret
from cellway.context import SystemClock
from cellway.db.api_tables import API_METADATA, quota_usages, reservations, server_charges
from cellway.db.engines import Database
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import OverQuota
from cellway.quota import limits, usage
from cellway.quota.limits import Allowed
from cellway.quota.usage import SERVER, Charge, Recount, Uncounted, Usage
from tests.databases import SLOW_SERVERS, Shelf, empty_database, engine_of, upgraded

DEFAULTS = limits.defaults_of(QuotaSection(instances=5, cores=8, ram=4096))
NOW = datetime(2026, 1, 1)
PROJECTS = ("p1", "p2")
USERS = ("alice", "Bob")
Key = tuple[str, str, str]


def allowed(tx: ApiTx, project: str, user: str) -> Callable[[], Allowed]:
    """Return the limits in force, as the verbs ask for them."""
    return lambda: limits.allowed(tx, DEFAULTS, project, user)


def reserve_servers(tx: ApiTx, charges: list[Charge]) -> None:
    """Reserve, counting first what is uncounted."""
    one = charges[0]
    try:
        usage.reserve_servers(tx, charges, allowed(tx, one.project_id, one.user_id))
    except Uncounted:
        usage.refresh(tx, one.project_id, [one.user_id])
        usage.reserve_servers(tx, charges, allowed(tx, one.project_id, one.user_id))


def charges_of(count: int, project: str, user: str, cores: int, ram: int) -> list[Charge]:
    """Return equal new servers."""
    return [Charge(str(uuid.uuid4()), project, user, cores, ram) for _ in range(count)]


def stored(tx: ApiTx) -> dict[Key, Usage]:
    """Return every usage as it stands in the table."""
    return {
        (row.project_id, row.user_id, row.resource): Usage(row.in_use, row.reserved)
        for row in tx.execute(sa.select(quota_usages))
    }


class Quotas(RuleBasedStateMachine):
    """Every sequence of operations leaves the usages that a model of dictionaries has."""

    servers = Bundle("servers")
    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.connection = engine_of(Secret(f"sqlite:///{self.folder.name}/api.db")).connect()
        self.connection.begin()
        API_METADATA.create_all(self.connection)
        self.now = NOW
        self.charged: dict[str, Charge] = {}
        self.committed: set[str] = set()
        self.held: dict[str, tuple[str, str, dict[str, int], datetime]] = {}
        self.extra: dict[Key, int] = {}
        self.project_limits: dict[tuple[str, str], int] = {}
        self.user_limits: dict[Key, int] = {}

    def teardown(self) -> None:
        """Close the database."""
        self.connection.close()
        self.folder.cleanup()

    @property
    def tx(self) -> ApiTx:
        """A transaction at the present time."""
        return ApiTx(self.connection, self.now)

    def limit(self, project: str, user: str, resource: str) -> int:
        """Return the limit that the model has: a user's, a project's, or the configured one."""
        found = self.project_limits.get((project, resource), DEFAULTS[resource])
        if user:
            found = self.user_limits.get((project, user, resource), found)
        return 10**9 if found < 0 else found

    def totals(self) -> dict[Key, Usage]:
        """Return what the model says of every usage."""
        in_use: dict[Key, int] = dict(self.extra)
        reserved: dict[Key, int] = {}
        for number, one in self.charged.items():
            where = in_use if number in self.committed else reserved
            for scope in ("", one.user_id):
                for resource, amount in one.taken.items():
                    key = one.project_id, scope, resource
                    where[key] = where.get(key, 0) + amount
        for project, user, asked, _ in self.held.values():
            for scope in ("", user):
                for resource, amount in asked.items():
                    key = project, scope, resource
                    reserved[key] = reserved.get(key, 0) + amount
        return {key: Usage(in_use.get(key, 0), reserved.get(key, 0)) for key in {*in_use, *reserved}}

    def fits(self, project: str, user: str, asked: dict[str, int]) -> bool:
        """Tell whether the model grants this."""
        totals = self.totals()
        return all(
            totals.get((project, scope, resource), Usage()).total + amount <= self.limit(project, scope, resource)
            for scope in ("", user)
            for resource, amount in asked.items()
        )

    @rule(
        target=servers,
        count=st.integers(1, 3),
        project=st.sampled_from(PROJECTS),
        user=st.sampled_from(USERS),
        cores=st.integers(0, 4),
        ram=st.integers(0, 2048),
    )
    def accept(self, count: int, project: str, user: str, cores: int, ram: int) -> object:
        """Servers are accepted, all or none."""
        self.recount(project)
        wanted = charges_of(count, project, user, cores, ram)
        asked = {resource: amount * count for resource, amount in wanted[0].taken.items()}
        if not self.fits(project, user, asked):
            before = {key: used for key, used in stored(self.tx).items() if used.total}
            with pytest.raises(OverQuota), self.connection.begin_nested():
                reserve_servers(self.tx, wanted)
            assert {key: used for key, used in stored(self.tx).items() if used.total} == before
            return multiple()
        reserve_servers(self.tx, wanted)
        self.charged |= {one.instance_uuid: one for one in wanted}
        return multiple(*(one.instance_uuid for one in wanted))

    @rule(server=servers)
    def finish(self, server: str) -> None:
        """A build comes to its end: what was reserved is in use, once."""
        there = server in self.charged and server not in self.committed and self.charged[server].instances > 0
        assert usage.commit(self.tx, server) == there
        if there:
            self.committed.add(server)

    @rule(server=servers)
    def bury(self, server: str) -> None:
        """A build fails for good: the server is kept and takes nothing."""
        there = server in self.charged and self.charged[server].instances > 0
        assert usage.refund(self.tx, server, keep=True) == there
        if there:
            self.charged[server] = replace(self.charged[server], instances=0, cores=0, ram=0)

    @rule(server=servers)
    def delete(self, server: str) -> None:
        """A server goes, built or not: what it took is given back, once."""
        assert usage.refund(self.tx, server) == (server in self.charged)
        self.charged.pop(server, None)
        self.committed.discard(server)

    @rule(
        target=holds,
        project=st.sampled_from(PROJECTS),
        user=st.sampled_from(USERS),
        asked=st.dictionaries(st.sampled_from(("cores", "ram")), st.integers(1, 3), min_size=1),
        seconds=st.integers(1, 100),
    )
    def reserve(self, project: str, user: str, asked: dict[str, int], seconds: int) -> object:
        """A change of a server's size reserves what it takes more."""
        number, expires = str(uuid.uuid4()), self.now + timedelta(seconds=seconds)

        def ask() -> None:
            usage.reserve(
                self.tx, number, project, user, asked, allowed(self.tx, project, user), expires_at=expires
            )  # fmt: skip

        self.recount(project)
        if not self.fits(project, user, asked):
            with pytest.raises(OverQuota), self.connection.begin_nested():
                ask()
            return multiple()
        ask()
        assert usage.is_reserved(self.tx, number)
        self.held[number] = project, user, asked, expires
        return number

    @rule(number=consumes(holds), wins=st.booleans())
    def settle(self, number: str, wins: bool) -> None:
        """A reservation is committed or rolled back, once, and does nothing when it has expired."""
        there = number in self.held
        assert (usage.commit if wins else usage.rollback)(self.tx, number) == there
        assert not usage.commit(self.tx, number)
        if there:
            project, user, asked, _ = self.held.pop(number)
            for scope in ("", user):
                for resource, amount in asked.items() if wins else ():
                    key = project, scope, resource
                    self.extra[key] = self.extra.get(key, 0) + amount

    @rule(seconds=st.integers(1, 60))
    def expire(self, seconds: int) -> None:
        """Time passes, and a sweep gives back what nobody settled."""
        self.now += timedelta(seconds=seconds)
        late = {number for number, hold in self.held.items() if hold[3] <= self.now}
        assert set(usage.list_expired(self.tx, 100)) == late
        for number in late:
            assert usage.rollback(self.tx, number)
            del self.held[number]

    @rule(project=st.sampled_from(PROJECTS))
    def recount(self, project: str) -> None:
        """Counting anew changes nothing, but for what nobody is charged for."""
        usage.refresh(self.tx, project, USERS)
        self.extra = {key: amount for key, amount in self.extra.items() if key[0] != project}

    @rule(
        project=st.sampled_from(PROJECTS),
        user=st.sampled_from(("", *USERS)),
        wanted=st.dictionaries(st.sampled_from(SERVER), st.integers(-1, 10)),
    )
    def set_limits(self, project: str, user: str, wanted: dict[str, int]) -> None:
        """Limits change, also to less than is used."""
        if user:
            limits.set_user(self.tx, project, user, wanted)
            self.user_limits |= {(project, user, resource): limit for resource, limit in wanted.items()}
        else:
            limits.set_project(self.tx, project, wanted)
            self.project_limits |= {(project, resource): limit for resource, limit in wanted.items()}

    @rule(project=st.sampled_from(PROJECTS), user=st.sampled_from(("", *USERS)))
    def delete_limits(self, project: str, user: str) -> None:
        """Limits go: a user's own, or the project's with all its users'."""
        if user:
            limits.delete_user(self.tx, project, user)
        else:
            limits.delete_project(self.tx, project)
            self.project_limits = {key: limit for key, limit in self.project_limits.items() if key[0] != project}
        self.user_limits = {
            key: limit for key, limit in self.user_limits.items() if key[0] != project or (user and key[1] != user)
        }

    @invariant()
    def the_tables_are_the_model(self) -> None:
        """Usages, charges and reservations are the model's."""
        assert {key: used for key, used in stored(self.tx).items() if used != Usage()} == {
            key: used for key, used in self.totals().items() if used != Usage()
        }
        assert set(self.tx.execute(sa.select(server_charges.c.instance_uuid)).scalars()) == set(self.charged)
        pending = set(self.tx.execute(sa.select(reservations.c.uuid)).scalars())
        building = {uuid for uuid, one in self.charged.items() if one.instances and uuid not in self.committed}
        assert pending == building | set(self.held)


TestQuotas = Quotas.TestCase
TestQuotas.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- many at once ----------------------------------------------------------------------------------------------

CALLERS = 32
LIMIT = 20


@pytest.fixture(params=SLOW_SERVERS)
def api(request: pytest.FixtureRequest, shelf: Shelf, tmp_path: Path) -> Iterator[Database[ApiTx]]:
    """An API database of each kind in turn, with a thread for every caller."""
    kind = request.param
    with empty_database("sqlite", tmp_path) as file:
        url = upgraded(file, Tree.API) if kind == "sqlite" else shelf.take(kind, "api")
        room = Limits(database_threads=CALLERS, database_queue=10_000, database_deadline_seconds=60.0)
        database = Database(url, ApiTx, cell=None, limits=room, clock=SystemClock())
        yield database
        database.close()


async def reserved(api: Database[ApiTx], charges: list[Charge]) -> bool:
    """Ask for servers as the verbs do; tell whether they were granted."""
    one = charges[0]

    def ask(tx: ApiTx) -> None:
        usage.reserve_servers(
            tx, charges, lambda: limits.allowed(tx, {**DEFAULTS, "instances": LIMIT}, one.project_id, one.user_id)
        )

    while True:
        try:
            await api.write_once(lambda tx: usage.is_reserved(tx, one.instance_uuid), ask)
        except Uncounted as error:
            await api.write(usage.refresh, error.project_id, [error.user_id])
        except OverQuota:
            return False
        else:
            return True


@pytest.mark.anyio
@pytest.mark.parametrize("operations", [25, pytest.param(200, marks=pytest.mark.slow)])
async def test_no_limit_is_passed_however_many_ask_at_once(api: Database[ApiTx], operations: int) -> None:
    """Users of two projects accept, finish, bury, delete and recount at once: no sum is ever above a limit, none of the
    changes is lost, and what is left is what is charged.
    """
    over = asyncio.Event()
    seen = 0

    async def watch() -> None:
        nonlocal seen
        while not over.is_set():
            for (_, _, resource), used in (await api.read(stored)).items():
                assert used.in_use >= 0
                assert used.reserved >= 0
                assert used.total <= {**DEFAULTS, "instances": LIMIT}[resource]
            seen += 1

    async def use(number: int) -> int:
        dice = random.Random(number)
        project, user = PROJECTS[number % 2], USERS[number // 2 % 2]
        mine: list[str] = []
        granted = 0
        for _ in range(operations):
            match dice.randrange(6) if mine else 0:
                case 0 | 1:
                    wanted = charges_of(dice.randint(1, 2), project, user, dice.randint(0, 1), dice.randint(0, 400))
                    if await reserved(api, wanted):
                        mine += [one.instance_uuid for one in wanted]
                        granted += 1
                case 2:
                    await api.write(usage.commit, dice.choice(mine))
                case 3:
                    await api.write(usage.refund, dice.choice(mine), keep=True)
                case 4:
                    assert await api.write(usage.refund, mine.pop(dice.randrange(len(mine))))
                case 5:
                    await api.write(usage.refresh, project, None)
        for server in mine:
            assert await api.write(usage.refund, server)
        return granted

    watching = asyncio.create_task(watch())
    granted = await asyncio.gather(*map(use, range(CALLERS)))
    over.set()
    await watching
    assert sum(granted) > CALLERS
    assert seen > 1
    left = await api.read(stored)
    assert set(left) == {
        (project, user, resource) for project in PROJECTS for user in ("", *USERS) for resource in SERVER
    }
    assert set(left.values()) == {Usage()}
    assert await api.read(lambda tx: tx.execute(sa.select(reservations)).all()) == []


@pytest.mark.anyio
async def test_exactly_as_many_are_granted_as_there_is_room_for(api: Database[ApiTx]) -> None:
    """Of 64 who ask at once for one server of a project that was never counted, as many get it as the limit says."""
    asked = [charges_of(1, "p1", USERS[number % 2], 0, 1) for number in range(64)]
    granted = await asyncio.gather(*(reserved(api, charges) for charges in asked))
    assert sum(granted) == LIMIT
    totals = await api.read(usage.find, "p1")
    assert totals["instances"] == Usage(0, LIMIT)
    charged = await api.read(lambda tx: set(tx.execute(sa.select(server_charges.c.instance_uuid)).scalars()))
    assert charged == {one.instance_uuid for (one,), got in zip(asked, granted, strict=True) if got}


@pytest.mark.anyio
async def test_a_limit_that_was_lowered_is_in_force_when_that_is_answered(api: Database[ApiTx]) -> None:
    """Whoever asks while a limit is lowered is granted under the old one before that is answered, or refused."""
    lowered = asyncio.Event()
    late: list[bool] = []

    async def lower() -> None:
        def change(tx: ApiTx) -> None:
            limits.set_project(tx, "p1", {"instances": 3})
            usage.lock(tx, "p1", "", SERVER)

        await api.write(change)
        lowered.set()

    async def ask() -> None:
        for _ in range(10):
            begun_late = lowered.is_set()
            charges = charges_of(1, "p1", "alice", 0, 1)
            granted = await reserved(api, charges)
            if begun_late and granted:
                late.append((await api.read(usage.find, "p1"))["instances"].total <= 3)
            if granted:
                await api.write(usage.refund, charges[0].instance_uuid)

    await asyncio.gather(*(ask() for _ in range(8)), lower())
    assert all(late)


@pytest.mark.anyio
async def test_several_resources_are_granted_together_or_not_at_all(api: Database[ApiTx]) -> None:
    """When the user's own limit of one resource refuses, nothing of the project's or of the others is taken."""
    await api.write(limits.set_user, "p1", "alice", {"ram": 100})
    assert not await reserved(api, charges_of(1, "p1", "alice", 1, 101))
    assert set((await api.read(stored)).values()) == {Usage()}
    assert await reserved(api, charges_of(1, "p1", "Bob", 1, 101))
    with pytest.raises(OverQuota) as refusal:
        await api.write(
            lambda tx: usage.reserve_servers(tx, charges_of(3, "p1", "Bob", 3, 2000), allowed(tx, "p1", "Bob"))
        )
    assert refusal.value.fields == {"resources": ["cores", "ram"], "room": 1}
    assert refusal.value.message == (
        "Quota exceeded for cores, ram: Requested 9, 6000, but already used 1, 101 of 8, 4096 cores, ram"
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("recount", "spoil"),
    [
        (Recount(), {"in_use": -1}),
        (Recount(), {"reserved": -1}),
        (Recount(after_seconds=60), {"updated_at": NOW}),
        (Recount(after_seconds=60), {"updated_at": None}),
        (Recount(after_uses=2), {"until_refresh": 0}),
    ],
)
async def test_a_usage_that_cannot_be_trusted_is_counted_first(
    api: Database[ApiTx], recount: Recount, spoil: dict[str, object]
) -> None:
    """A usage below 0, or counted too long or too many uses ago, decides nothing until it is counted anew."""
    one = charges_of(1, "p1", "alice", 1, 1)
    await api.write(usage.refresh, "p1", ["alice"], recount=recount)
    await api.write(lambda tx: tx.execute(sa.update(quota_usages).values(**spoil)).rowcount)
    with pytest.raises(Uncounted) as refusal:
        await api.write(lambda tx: usage.reserve_servers(tx, one, allowed(tx, "p1", "alice"), recount=recount))
    assert not refusal.value.first
    with pytest.raises(Uncounted):
        await api.read(usage.get, "p1", "alice", recount=recount)
    await api.write(usage.refresh, "p1", ["alice"], recount=recount)
    await api.write(lambda tx: usage.reserve_servers(tx, one, allowed(tx, "p1", "alice"), recount=recount))
    assert (await api.read(usage.find, "p1", "alice"))["cores"] == Usage(0, 1)


@pytest.mark.anyio
async def test_a_usage_is_counted_anew_after_so_many_uses(api: Database[ApiTx]) -> None:
    """With `until_refresh` at 2 the third reservation waits for a count."""
    recount = Recount(after_uses=2)

    def reserve(tx: ApiTx, charges: list[Charge]) -> None:
        usage.reserve_servers(tx, charges, allowed(tx, "p1", "alice"), recount=recount)

    await api.write(usage.refresh, "p1", ["alice"], recount=recount)

    for _ in range(2):
        one = charges_of(1, "p1", "alice", 0, 1)
        await api.write(reserve, one)
    with pytest.raises(Uncounted):
        await api.write(reserve, charges_of(1, "p1", "alice", 0, 1))


@pytest.mark.anyio
async def test_two_sweeps_give_an_expired_reservation_back_once(api: Database[ApiTx]) -> None:
    """However many processes sweep, what a lost caller reserved is returned once, and not what is still in its time."""
    await api.write(usage.refresh, "p1", ["alice"])

    def reserve(tx: ApiTx, number: str, seconds: int) -> None:
        expires = tx.now + timedelta(seconds=seconds)
        usage.reserve(tx, number, "p1", "alice", {"cores": 2}, allowed(tx, "p1", "alice"), expires_at=expires)

    await api.write(reserve, str(uuid.UUID(int=1)), -1)
    await api.write(reserve, str(uuid.UUID(int=2)), 3600)
    late = await api.read(usage.list_expired, 10)
    assert late == [str(uuid.UUID(int=1))]
    done = await asyncio.gather(*(api.write(usage.rollback, late[0]) for _ in range(8)))
    assert sorted(done) == [False] * 7 + [True]
    assert (await api.read(usage.find, "p1"))["cores"] == Usage(0, 2)
