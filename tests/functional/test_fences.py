"""Fences: nobody who was overtaken — a builder, a host, a message that comes late or twice — changes anything."""

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from cellway import hosts
from cellway.db.cell_tables import instance_actions_events, instance_faults, instance_fences, instances
from cellway.db.schema import Tree
from cellway.db.transaction import CellTx
from cellway.errors import Conflict, NotFound
from cellway.instances import actions, lifecycle, reading, writing
from cellway.instances.lifecycle import FenceState
from cellway.instances.records import Fault, Instance, TaskState, VmState
from cellway.rpc.calls import HostReport, HostResources
from tests.databases import KINDS, empty_database, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)
UUID = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
HOST = "h1"
OTHER = "h2"
SERVER = Instance(
    uuid=UUID,
    project_id="demo",
    user_id="alice",
    display_name="s",
    created_at=NOW,
    flavor="{}",
    vcpus=1,
    memory_mb=512,
    root_gb=1,
)
RESOURCES = HostResources(
    vcpus=4,
    memory_mb=4096,
    disk_gb=40,
    cpu_allocation_ratio=1.0,
    ram_allocation_ratio=1.0,
    disk_allocation_ratio=1.0,
    hypervisor_type="fake",
    hypervisor_version=1,
    hypervisor_hostname=HOST,
    cpu_info="{}",
    host_ip="127.0.0.1",
)
WHO = {"request_id": "req-1", "user_id": "alice", "project_id": "demo"}


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """A cell's database of each kind in turn."""
    with empty_database(request.param, tmp_path_factory.mktemp("fences")) as url:
        made = engine_of(upgraded(url, Tree.CELL))
        yield made
        made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[CellTx]:
    """A transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield CellTx(connection, NOW)
        transaction.rollback()


def put(tx: CellTx, generation: int = 1, attempt: int = 1, host: str | None = HOST) -> str:
    """Make the instance, as a builder does."""
    instance = msgspec.structs.replace(SERVER, host=host, node=host)
    return lifecycle.put(tx, instance, generation=generation, attempt=attempt, host=host, request_id="req-0")


def start(tx: CellTx, attempt: int = 1, host: str = HOST, epoch: int = 1) -> bool:
    """Ask to build, as an agent does."""
    return lifecycle.start_build(tx, UUID, attempt=attempt, host=host, epoch=epoch)


def finish(tx: CellTx, attempt: int = 1, host: str = HOST, epoch: int = 1, failure: str | None = None) -> bool:
    """Report that a build ended, as an agent does."""
    return lifecycle.finish_build(tx, UUID, attempt=attempt, host=host, epoch=epoch, sequence=1, failure=failure)


def state(tx: CellTx) -> str:
    """Return how far the attempt is that counts."""
    return lifecycle.fences(tx, [UUID])[UUID].state


def built(tx: CellTx) -> None:
    """Make the instance and let its host finish it."""
    put(tx)
    assert start(tx)
    assert finish(tx)


def rows(tx: CellTx) -> list[Any]:
    """Return the instance's rows, live or not."""
    return list(tx.execute(sa.select(instances.c.host, instances.c.deleted)).all())


# ---- builders --------------------------------------------------------------------------------------------------


def test_putting_twice_makes_one_instance(tx: CellTx) -> None:
    """The same attempt put again, also by the builder that took over, finds the instance as it is."""
    assert put(tx) == FenceState.PLACED
    assert start(tx)
    assert put(tx, generation=2) == FenceState.BUILDING
    assert rows(tx) == [(HOST, 0)]
    assert reading.get(tx, UUID).task_state == TaskState.SPAWNING


def test_an_overtaken_builder_puts_nothing(tx: CellTx) -> None:
    """A lower generation than the cell has seen is refused, also with a higher attempt."""
    put(tx, generation=2)
    with pytest.raises(Conflict):
        put(tx, generation=1, attempt=2, host=OTHER)
    assert rows(tx) == [(HOST, 0)]


def test_an_overtaken_builder_withdraws_nothing(tx: CellTx) -> None:
    """A lower generation than the cell has seen takes no instance out of it."""
    put(tx, generation=2)
    with pytest.raises(Conflict):
        lifecycle.withdraw(tx, UUID, generation=1)
    assert rows(tx) == [(HOST, 0)]


def test_a_cell_that_was_left_refuses_the_builder_that_was_overtaken(tx: CellTx) -> None:
    """A withdrawal fences a cell in which the instance never was: the late first builder cannot put it there."""
    assert lifecycle.withdraw(tx, UUID, generation=2)
    with pytest.raises(Conflict):
        put(tx, generation=1)
    assert rows(tx) == []


def test_an_earlier_attempt_is_refused(tx: CellTx) -> None:
    """Once an attempt was put, none with a lower number is."""
    put(tx, attempt=2)
    with pytest.raises(Conflict):
        put(tx, attempt=1, host=OTHER)
    assert rows(tx) == [(HOST, 0)]


def test_a_later_attempt_replaces_the_earlier(tx: CellTx) -> None:
    """The instance is made anew for the next host, with one record of its creation."""
    put(tx)
    assert start(tx)
    assert put(tx, attempt=2, host=OTHER) == FenceState.PLACED
    assert rows(tx) == [(OTHER, 0)]
    assert [action.action for action in actions.list_of(tx, UUID)] == ["create"]


def test_the_number_of_a_withdrawn_attempt_is_spent(tx: CellTx) -> None:
    """Late orders about it may be under way, so nothing is built under it again."""
    put(tx)
    assert lifecycle.withdraw(tx, UUID, generation=1)
    assert put(tx, generation=2) == FenceState.WITHDRAWN
    assert rows(tx) == []
    assert put(tx, generation=2, attempt=2) == FenceState.PLACED


def test_withdrawing_twice_is_withdrawing_once(tx: CellTx) -> None:
    """Nothing is left but the fence, however often."""
    put(tx)
    assert lifecycle.withdraw(tx, UUID, generation=1)
    assert lifecycle.withdraw(tx, UUID, generation=1)
    assert rows(tx) == []
    assert state(tx) == FenceState.WITHDRAWN
    assert actions.list_of(tx, UUID) == []


def test_a_running_server_is_not_taken_back(tx: CellTx) -> None:
    """Whoever wants to withdraw a build that its host has finished is told so, and changes nothing."""
    built(tx)
    assert not lifecycle.withdraw(tx, UUID, generation=1)
    assert reading.get(tx, UUID).vm_state == VmState.ACTIVE
    assert put(tx, generation=2) == FenceState.ACTIVE


def test_a_server_without_a_host_is_put_with_its_fault(tx: CellTx) -> None:
    """It is in ERROR from the start, its fault says why, and no host can build it."""
    fault = Fault(code=500, message="No valid host was found.", details=None, created_at=NOW)
    buried = msgspec.structs.replace(SERVER, vm_state=VmState.ERROR.value, task_state=None, fault=fault)
    lifecycle.put(tx, buried, generation=1, attempt=1, host=None, request_id="req-0")
    found = reading.get(tx, UUID)
    assert found.fault is not None
    assert found.fault.message == "No valid host was found."
    assert [action.message for action in actions.list_of(tx, UUID)] == ["Error"]
    assert not start(tx)


# ---- builds on a host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "host"), [(1, HOST), (3, HOST), (2, OTHER)], ids=["stale", "not yet", "another host"]
)
def test_only_the_attempt_and_host_that_count_build(tx: CellTx, attempt: int, host: str) -> None:
    """START_BUILD for another attempt or host is refused."""
    put(tx, attempt=2)
    assert not start(tx, attempt=attempt, host=host)
    assert state(tx) == FenceState.PLACED


def test_a_host_that_asks_again_is_told_the_same(tx: CellTx) -> None:
    """An agent that did not hear the answer may go on, and the build is recorded once."""
    put(tx)
    assert start(tx)
    assert start(tx)
    assert len(tx.execute(sa.select(instance_actions_events.c.id)).all()) == 1


def test_a_host_that_starts_anew_goes_on_and_its_past_does_not(tx: CellTx) -> None:
    """The new epoch takes the build over; the old one can neither start nor finish it."""
    put(tx)
    assert start(tx, epoch=1)
    assert start(tx, epoch=2)
    assert not start(tx, epoch=1)
    assert not finish(tx, epoch=1)
    assert finish(tx, epoch=2)


@pytest.mark.parametrize("failure", [None, "it broke"])
def test_an_ended_build_is_not_begun_again(tx: CellTx, failure: str | None) -> None:
    """A repeated order for an attempt that ended, well or badly, is refused."""
    put(tx)
    start(tx)
    assert finish(tx, failure=failure)
    assert not start(tx)
    assert not start(tx, epoch=2)


def test_a_build_that_was_not_begun_cannot_end(tx: CellTx) -> None:
    """FINISH_BUILD without START_BUILD is refused."""
    put(tx)
    assert not finish(tx)
    assert reading.get(tx, UUID).vm_state == VmState.BUILDING


def test_a_repeated_report_has_one_effect(tx: CellTx) -> None:
    """The second is accepted, and what the user did in between stays."""
    built(tx)
    tx.execute(sa.update(instances).values(vm_state=VmState.STOPPED.value))
    assert finish(tx)
    assert reading.get(tx, UUID).vm_state == VmState.STOPPED


def test_contradicting_reports_the_first_counts(tx: CellTx) -> None:
    """After success a failure of the same attempt is refused, and the other way round."""
    built(tx)
    assert not finish(tx, failure="it broke")
    assert state(tx) == FenceState.ACTIVE
    put(tx, attempt=2)
    start(tx, attempt=2)
    assert finish(tx, attempt=2, failure="it broke")
    assert not finish(tx, attempt=2)
    assert state(tx) == FenceState.FAILED


def test_a_report_of_a_withdrawn_build_is_refused(tx: CellTx) -> None:
    """The host that finishes too late is told so, and removes its guest."""
    put(tx)
    start(tx)
    lifecycle.withdraw(tx, UUID, generation=1)
    assert not finish(tx)
    put(tx, attempt=2, host=OTHER)
    assert not finish(tx)
    assert state(tx) == FenceState.PLACED


# ---- epochs ----------------------------------------------------------------------------------------------------


def register(tx: CellTx) -> int:
    """Register the host, and return its epoch."""
    return hosts.register(tx, HOST, RESOURCES, service_uuid=UUID, node_uuid=UUID, version=1)


def beat(epoch: int, sequence: int, vcpus: int) -> HostReport:
    """Return a heartbeat."""
    return HostReport(
        host=HOST, epoch=epoch, sequence=sequence, running=0, vcpus_used=vcpus, memory_mb_used=0, disk_gb_used=0
    )


def test_epochs_rise_and_the_lower_ones_are_refused(tx: CellTx) -> None:
    """Each registration ends what was before it."""
    first, second = register(tx), register(tx)
    assert second > first
    assert not hosts.check_epoch(tx, HOST, first)
    assert hosts.check_epoch(tx, HOST, second)
    assert not hosts.report(tx, beat(first, 100, 1))
    assert hosts.report(tx, beat(second, 1, 1))


def test_a_host_that_never_registered_is_not_found(tx: CellTx) -> None:
    """Its reports are answered with NotFound, so that it registers."""
    with pytest.raises(NotFound):
        hosts.report(tx, beat(1, 1, 0))


def test_reports_count_in_the_order_of_their_numbers(tx: CellTx) -> None:
    """A heartbeat that arrives late or twice does not end the agent, and changes nothing."""
    epoch = register(tx)
    assert hosts.report(tx, beat(epoch, 2, 2))
    before = hosts.list_rows(tx)
    assert hosts.report(tx, beat(epoch, 1, 1))
    assert hosts.report(tx, beat(epoch, 2, 3))
    assert hosts.list_rows(tx) == before
    assert before[0].vcpus_used == 2


# ---- actions ---------------------------------------------------------------------------------------------------


def begin(tx: CellTx, name: str = "reboot", request_id: str = "req-1") -> str:
    """Accept an action, as the API does."""
    return actions.begin(tx, UUID, name, **(WHO | {"request_id": request_id}), may_override_lock=False)


def start_action(tx: CellTx, name: str = "reboot", request_id: str = "req-1", host: str = HOST) -> bool:
    """Ask to act, as an agent does."""
    return actions.start(tx, UUID, name, request_id=request_id, host=host)


def finish_action(tx: CellTx, name: str = "reboot", request_id: str = "req-1", failure: str | None = None) -> bool:
    """Report that an action ended, as an agent does."""
    return actions.finish(tx, UUID, name, request_id=request_id, host=HOST, power_state=1, failure=failure)


def task(tx: CellTx) -> str | None:
    """Return what is being done to the instance."""
    return reading.get(tx, UUID).task_state


def test_an_action_is_not_begun_twice(tx: CellTx) -> None:
    """Its own host is told the same again while it is at it; another host, or anybody after the end, is refused."""
    built(tx)
    begin(tx)
    assert not start_action(tx, host=OTHER)
    assert start_action(tx)
    assert start_action(tx)
    assert finish_action(tx)
    assert not start_action(tx)
    assert [event.event for event in actions.get_with_events(tx, UUID, "req-1")[1]] == ["compute_reboot_instance"]


def test_an_action_that_was_not_asked_for_is_refused(tx: CellTx) -> None:
    """Neither another operation nor another request id than the recorded one is begun."""
    built(tx)
    begin(tx)
    assert not start_action(tx, request_id="req-2")
    assert not start_action(tx, name="stop")


def test_a_repeated_report_ends_no_later_action(tx: CellTx) -> None:
    """The report of a reboot, arriving again during the next reboot, leaves that one alone."""
    built(tx)
    begin(tx)
    start_action(tx)
    assert finish_action(tx)
    begin(tx, request_id="req-2")
    assert start_action(tx, request_id="req-2")
    assert not finish_action(tx)
    assert task(tx) == TaskState.REBOOTING
    assert finish_action(tx, request_id="req-2")
    assert task(tx) is None


def test_an_action_overtaken_by_a_hard_reboot_ends_nothing(tx: CellTx) -> None:
    """What was under way is overtaken: its report is refused, and the hard reboot is still to be done."""
    built(tx)
    begin(tx, name="stop")
    start_action(tx, name="stop")
    begin(tx, name="hard_reboot", request_id="req-2")
    assert not finish_action(tx, name="stop")
    assert reading.get(tx, UUID).vm_state == VmState.ACTIVE
    assert start_action(tx, name="hard_reboot", request_id="req-2")


def test_an_action_that_could_not_be_sent_is_taken_back(tx: CellTx) -> None:
    """The server is free again, the record says what happened, and a late message is refused."""
    built(tx)
    begin(tx)
    actions.take_back(tx, UUID, "reboot", request_id="req-1", failure="nobody there")
    assert task(tx) is None
    assert actions.list_of(tx, UUID)[0].message == "Error"
    assert not start_action(tx)


def test_an_action_that_was_sent_all_the_same_is_not_taken_back(tx: CellTx) -> None:
    """Once its host has begun, it goes on to its end."""
    built(tx)
    begin(tx)
    assert start_action(tx)
    actions.take_back(tx, UUID, "reboot", request_id="req-1", failure="no answer")
    assert task(tx) == TaskState.REBOOTING
    assert finish_action(tx)


def test_a_failed_action_leaves_the_state_and_a_fault(tx: CellTx) -> None:
    """The server is what it was, and its owner can read why the action failed."""
    built(tx)
    begin(tx, name="stop")
    start_action(tx, name="stop")
    assert finish_action(tx, name="stop", failure="it broke")
    found = reading.get(tx, UUID)
    assert (found.vm_state, found.task_state) == (VmState.ACTIVE, None)
    assert tx.execute(sa.select(instance_faults.c.message)).scalars().all() == ["it broke"]


def test_a_host_that_starts_anew_gets_what_is_left_and_gives_up_what_it_began(tx: CellTx) -> None:
    """An action that was never begun is handed over; one that was begun is closed, and its server is free."""
    built(tx)
    begin(tx)
    assert actions.hand_over(tx, HOST) == {UUID: ("reboot", "req-1")}
    start_action(tx)
    assert actions.hand_over(tx, HOST) == {}
    assert task(tx) is None
    assert not finish_action(tx)
    assert actions.list_of(tx, UUID)[0].message == "Error"


# ---- two at once -----------------------------------------------------------------------------------------------


@pytest.fixture
def committed(engine: sa.Engine) -> Iterator[sa.Engine]:
    """The database with a server that runs, for transactions that commit; emptied after the test."""
    with engine.begin() as connection:
        built(CellTx(connection, NOW))
    yield engine
    with engine.begin() as connection:
        writing.erase(CellTx(connection, NOW), UUID)
        connection.execute(sa.delete(instance_fences))


def at_once(engine: sa.Engine, work: Callable[[CellTx], bool], times: int = 2) -> list[bool]:
    """Run `work` in transactions of several threads that begin at the same moment, and return what each gave."""
    ready = threading.Barrier(times)
    results: list[bool] = []

    def run() -> None:
        mode = {"begin": "BEGIN IMMEDIATE"} if engine.dialect.name == "sqlite" else {}
        with engine.connect().execution_options(**mode) as connection:
            ready.wait(30)
            with connection.begin():
                results.append(work(CellTx(connection, NOW + timedelta(seconds=1))))

    threads = [threading.Thread(target=run) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == times
    return results


def test_of_reports_at_once_one_counts(committed: sa.Engine) -> None:
    """Two conductors that write the end of one action: one does, and the instance changes once."""
    with committed.begin() as connection:
        tx = CellTx(connection, NOW)
        begin(tx, name="stop")
        assert start_action(tx, name="stop")
    assert sorted(at_once(committed, lambda tx: finish_action(tx, name="stop"), 4)) == [False, False, False, True]
    with committed.connect() as connection:
        assert reading.get(CellTx(connection, NOW), UUID).vm_state == VmState.STOPPED


def test_of_questions_at_once_one_is_recorded(committed: sa.Engine) -> None:
    """Two conductors that hear the same host's question record one beginning."""
    with committed.begin() as connection:
        begin(CellTx(connection, NOW))
    assert at_once(committed, start_action, 4) == [True] * 4
    with committed.connect() as connection:
        assert len(actions.get_with_events(CellTx(connection, NOW), UUID, "req-1")[1]) == 1


def test_of_requests_at_once_one_is_accepted(committed: sa.Engine) -> None:
    """Of reboots that are asked for at the same moment one takes the server; the others are refused."""

    def ask(tx: CellTx) -> bool:
        try:
            begin(tx, request_id=f"req-{threading.get_ident()}")
        except Conflict:
            return False
        return True

    assert sorted(at_once(committed, ask, 4)) == [False, False, False, True]
