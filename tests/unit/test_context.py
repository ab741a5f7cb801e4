"""Contexts: who asks, what crosses a queue, and what never shows."""

import dataclasses
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellway.context import CellContext, CellRef, RequestContext, SystemClock, WireContext, service_context
from cellway.ids import CellUuid, ProjectId, RequestId, UserId
from cellway.rpc.transport import NullTransport

CELL = CellRef(CellUuid("11111111-1111-4111-8111-111111111111"), "one")
KEY = "11111111-1111-4111-8111-111111111111:0123456789abcdef"

contexts = st.builds(
    RequestContext,
    user_id=st.text().map(UserId),
    project_id=st.text().map(ProjectId),
    request_id=st.text().map(RequestId),
    roles=st.frozensets(st.text()),
)


def make(**changes: str) -> RequestContext:
    """Return alice's context."""
    return RequestContext(
        user_id=UserId(changes.get("user", "alice")),
        project_id=ProjectId("demo"),
        request_id=RequestId("req-1"),
        roles=frozenset({"reader", "member"}),
    )


def targeted() -> CellContext:
    """Return alice's context, targeted at a cell."""
    return CellContext(
        user_id=UserId("alice"),
        project_id=ProjectId("demo"),
        request_id=RequestId("req-1"),
        cell=CELL,
        db_connection=KEY,
        mq_connection=NullTransport(),
    )


def test_a_new_context_is_targeted_at_no_cell() -> None:
    """Both connections are None until `target_cell`."""
    assert (make().db_connection, make().mq_connection) == (None, None)


def test_a_cell_context_needs_both_connections() -> None:
    """There is no context that reaches a database here and a queue elsewhere."""
    for missing in ("db_connection", "mq_connection", "cell"):
        given = {field.name: getattr(targeted(), field.name) for field in dataclasses.fields(CellContext)}
        del given[missing]
        with pytest.raises(TypeError):
            CellContext(**given)


@given(contexts)
def test_a_context_crosses_a_queue_unchanged(context: RequestContext) -> None:
    """Packed, sent and unpacked it says the same of who asks, whatever the names are."""
    packed = msgspec.msgpack.encode(context.to_wire())
    assert RequestContext.from_wire(msgspec.msgpack.decode(packed, type=WireContext)) == context


def test_connections_do_not_cross_a_queue() -> None:
    """What leaves the process is who asks, and nothing else."""
    assert WireContext.__struct_fields__ == ("user_id", "project_id", "roles", "request_id")
    assert KEY.encode() not in msgspec.msgpack.encode(targeted().to_wire())


def test_the_receiver_sets_its_own_transport() -> None:
    """And reaches no database through the context of a message."""
    transport = NullTransport()
    received = RequestContext.from_wire(targeted().to_wire(), transport)
    assert received.mq_connection is transport
    assert received.db_connection is None
    assert not isinstance(received, CellContext)


def test_roles_cross_in_one_order() -> None:
    """The same context is always the same bytes."""
    assert make().to_wire().roles == ("member", "reader")


def test_repr_shows_no_connection() -> None:
    """Neither the key nor the transport, targeted or not; the cell's name is shown."""
    shown = f"{targeted()!r} {targeted()}"
    assert "one" in shown
    assert not any(hidden in shown for hidden in (KEY, "db_connection", "mq_connection", "Transport"))


def test_a_context_is_frozen() -> None:
    """Nobody can point it at another cell, nor become someone else."""
    for name in ("db_connection", "mq_connection", "user_id", "roles"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(targeted(), name, None)
    with pytest.raises((AttributeError, TypeError)):
        make().anything = 1  # type: ignore[attr-defined]


def test_a_new_request_id_changes_nothing_else() -> None:
    """A targeted context stays targeted, at the same cell."""
    before = targeted()
    after = before.with_request_id(RequestId("req-2"))
    assert after == dataclasses.replace(before, request_id=RequestId("req-2"))
    assert isinstance(after, CellContext)
    assert before.request_id == "req-1"


def test_contexts_are_values() -> None:
    """Equal when they say the same, and usable as keys."""
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(user="bob")


def test_our_own_loops_are_nobody() -> None:
    """They work under no user, no project and no role, so no policy lets them in."""
    context = service_context(RequestId("req-1"))
    assert (context.user_id, context.project_id, context.roles) == ("", "", frozenset())


def test_the_machines_clock_is_naive_utc() -> None:
    """As the databases hold it; the other clock never goes back."""
    clock = SystemClock()
    now = clock.now()
    assert now.tzinfo is None
    assert abs(datetime.now(UTC).replace(tzinfo=None) - now) < timedelta(minutes=1)
    assert clock.monotonic() <= clock.monotonic()


@pytest.mark.anyio
async def test_the_machines_clock_sleeps() -> None:
    """For as long as it is told, by its own monotonic time."""
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - before >= 0.009
