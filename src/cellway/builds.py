"""Accepted work that waits to be carried out: build requests with their claims, and delete requests.

All of it is rows in the API database, so any process can go on with what another began. A claim expires and is
fenced: each take-over raises its generation, and every later write of the overtaken builder finds that out.
`compute/api.py`
accepts, `compute/build.py` and `compute/delete.py` carry out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from cellway.db.api_tables import build_claims, build_requests, delete_requests, request_specs
from cellway.db.transaction import ApiTx, insert_if_absent
from cellway.errors import Conflict

_CLAIM = build_claims.c


@dataclass(frozen=True, slots=True)
class NewBuild:
    """A request as it is accepted. `instance` and `spec` are JSON that this module does not read."""

    instance_uuid: str
    project_id: str
    instance: str
    spec: str


@dataclass(frozen=True, slots=True)
class BuildClaim:
    """A request that this process works on, under `generation`."""

    instance_uuid: str
    generation: int
    attempt: int
    takeovers: int
    failed_hosts: tuple[str, ...]
    failure: str | None
    cancelled: bool
    instance: str
    spec: str


class Overtaken(Conflict):
    """Another builder has the claim now, or the request is gone: change nothing more."""

    def __init__(self, uuid: str) -> None:
        super().__init__("build.overtaken", f"Another builder has taken over instance {uuid}", instance=uuid)


_REQUEST = sa.select(build_requests.c.instance).where(build_requests.c.instance_uuid == sa.bindparam("the_uuid"))
_REQUESTS = sa.select(build_requests.c.instance).order_by(build_requests.c.id)
_REQUESTS_OF = _REQUESTS.where(build_requests.c.project_id == sa.bindparam("the_project"))
_WAITING = (
    sa.select(_CLAIM.instance_uuid)
    .where(_CLAIM.expires_at <= sa.bindparam("now"))
    .order_by(_CLAIM.id)
    .limit(sa.bindparam("most"))
)
_TAKE = (
    sa.update(build_claims)
    .where(_CLAIM.instance_uuid == sa.bindparam("the_uuid"), _CLAIM.expires_at <= sa.bindparam("now"))
    .values(
        generation=_CLAIM.generation + 1,
        takeovers=_CLAIM.takeovers + 1,
        expires_at=sa.bindparam("until"),
        updated_at=sa.bindparam("now"),
    )
)
_TAKEN = (
    sa.select(
        _CLAIM.instance_uuid,
        _CLAIM.generation,
        _CLAIM.attempt,
        _CLAIM.takeovers,
        _CLAIM.failed_hosts,
        _CLAIM.failure,
        _CLAIM.cancelled,
        build_requests.c.instance,
        request_specs.c.spec,
    )
    .join(build_requests, build_requests.c.instance_uuid == _CLAIM.instance_uuid)
    .join(request_specs, request_specs.c.instance_uuid == _CLAIM.instance_uuid)
    .where(_CLAIM.instance_uuid == sa.bindparam("the_uuid"))
)
_MINE = sa.and_(_CLAIM.instance_uuid == sa.bindparam("the_uuid"), _CLAIM.generation == sa.bindparam("the_generation"))
_RENEW = sa.update(build_claims).where(_MINE).values(expires_at=sa.bindparam("until"), updated_at=sa.bindparam("now"))
_CANCELLED = sa.select(_CLAIM.instance_uuid).where(
    _CLAIM.instance_uuid.in_(sa.bindparam("uuids", expanding=True)), _CLAIM.cancelled
)
_CANCEL = (
    sa.update(build_claims)
    .where(_CLAIM.instance_uuid == sa.bindparam("the_uuid"))
    .values(cancelled=True, updated_at=sa.bindparam("now"))
)
_UNFINISHED = sa.union(
    sa.select(build_requests.c.instance_uuid).where(
        build_requests.c.instance_uuid.in_(sa.bindparam("uuids", expanding=True))
    ),
    sa.select(delete_requests.c.instance_uuid).where(
        delete_requests.c.instance_uuid.in_(sa.bindparam("uuids", expanding=True))
    ),
)
_BUILDING = sa.select(_CLAIM.instance_uuid).where(_CLAIM.instance_uuid == sa.bindparam("the_uuid"))


def create(tx: ApiTx, builds: Sequence[NewBuild]) -> None:
    """Accept requests: the record that GET answers from, what was asked for, and a claim that anybody may take."""
    tx.execute(
        sa.insert(request_specs),
        [{"created_at": tx.now, "instance_uuid": build.instance_uuid, "spec": build.spec} for build in builds],
    )
    tx.execute(
        sa.insert(build_requests),
        [
            {
                "created_at": tx.now,
                "project_id": build.project_id,
                "instance_uuid": build.instance_uuid,
                "instance": build.instance,
            }
            for build in builds
        ],
    )
    tx.execute(
        sa.insert(build_claims),
        [
            {
                "created_at": tx.now,
                "instance_uuid": build.instance_uuid,
                "generation": 0,
                "takeovers": 0,
                "attempt": 0,
                "expires_at": tx.now,
                "cancelled": False,
                "failed_hosts": "[]",
            }
            for build in builds
        ],
    )


def find_request(tx: ApiTx, uuid: str) -> str | None:
    """Return the instance record of a request that is not finished."""
    return tx.execute(_REQUEST, {"the_uuid": uuid}).scalar_one_or_none()


def list_requests(tx: ApiTx, project_id: str | None) -> list[str]:
    """Return the instance records of unfinished requests, of one project or all."""
    if project_id is None:
        return list(tx.execute(_REQUESTS).scalars())
    return list(tx.execute(_REQUESTS_OF, {"the_project": project_id}).scalars())


def list_waiting(tx: ApiTx, most: int) -> list[str]:
    """Return requests whose claim nobody holds, the oldest first."""
    return list(tx.execute(_WAITING, {"now": tx.now, "most": most}).scalars())


def take(tx: ApiTx, uuid: str, seconds: float) -> BuildClaim | None:
    """Take a request's claim for `seconds`; None when another process has it, or it is done."""
    until = tx.now + timedelta(seconds=seconds)
    if tx.execute(_TAKE, {"the_uuid": uuid, "now": tx.now, "until": until}).rowcount != 1:
        return None
    row = tx.execute(_TAKEN, {"the_uuid": uuid}).one_or_none()
    if row is None:
        return None
    return BuildClaim(
        row.instance_uuid, row.generation, row.attempt, row.takeovers, _hosts(row.failed_hosts), row.failure,
        bool(row.cancelled), row.instance, row.spec,
    )  # fmt: skip


def hold(tx: ApiTx, claim: BuildClaim, seconds: float) -> None:
    """Renew a claim, and with it lock its row: the first statement of every transaction that a builder writes.

    Raises: Overtaken.
    """
    until = tx.now + timedelta(seconds=seconds)
    mine = {"the_uuid": claim.instance_uuid, "the_generation": claim.generation}
    if tx.execute(_RENEW, {**mine, "now": tx.now, "until": until}).rowcount != 1:
        raise Overtaken(claim.instance_uuid)


def set_attempt(tx: ApiTx, claim: BuildClaim, attempt: int) -> None:
    """Write the number of the build attempt that is about to be made. Call `hold` first."""
    _set(tx, claim, attempt=attempt)


def set_failed(tx: ApiTx, claim: BuildClaim, failed_hosts: Sequence[str], failure: str) -> None:
    """Write which hosts have failed this build, and why the last one did. Call `hold` first."""
    _set(tx, claim, failed_hosts=msgspec.json.encode(list(failed_hosts)).decode(), failure=failure)


def postpone(tx: ApiTx, claim: BuildClaim, seconds: float) -> None:
    """Give a claim back for now; anybody may take it after `seconds`. This does not count as a take-over.

    Raises: Overtaken.
    """
    hold(tx, claim, seconds)
    _set(tx, claim, takeovers=max(0, claim.takeovers - 1))


def _set(tx: ApiTx, claim: BuildClaim, **values: Any) -> None:
    mine = {"the_uuid": claim.instance_uuid, "the_generation": claim.generation}
    tx.execute(sa.update(build_claims).where(_MINE).values(**values), mine)


def list_cancelled(tx: ApiTx, uuids: Sequence[str]) -> list[str]:
    """Return those of the requests whose deletion was asked for."""
    return list(tx.execute(_CANCELLED, {"uuids": list(uuids)}).scalars())


def is_building(tx: ApiTx, uuid: str) -> bool:
    """Tell whether a builder still has to finish this request."""
    return tx.execute(_BUILDING, {"the_uuid": uuid}).first() is not None


def finish(tx: ApiTx, claim: BuildClaim) -> None:
    """Remove a request that is done. The request spec stays for the instance's life. Raises: Overtaken."""
    hold(tx, claim, 0)
    tx.execute(sa.delete(build_requests).where(build_requests.c.instance_uuid == claim.instance_uuid))
    tx.execute(sa.delete(build_claims).where(_CLAIM.instance_uuid == claim.instance_uuid))


def _hosts(text: str | None) -> tuple[str, ...]:
    return msgspec.json.decode(text or "[]", type=tuple[str, ...])


def list_unfinished(tx: ApiTx, uuids: Sequence[str]) -> set[str]:
    """Return those of these instances that are still to be built, or to be deleted."""
    return set(tx.execute(_UNFINISHED, {"uuids": list(uuids)}).scalars())


# ---- deleting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeleteRequest:
    """A deletion that was accepted, and who asked."""

    instance_uuid: str
    project_id: str
    user_id: str
    request_id: str
    attempts: int


_DELETE = delete_requests.c
_DUE = (
    sa.select(_DELETE.instance_uuid, _DELETE.project_id, _DELETE.user_id, _DELETE.request_id, _DELETE.attempts)
    .where(_DELETE.next_try_at <= sa.bindparam("now"))
    .order_by(_DELETE.next_try_at, _DELETE.id)
    .limit(sa.bindparam("most"))
)
_TRY = (
    sa.update(delete_requests)
    .where(_DELETE.instance_uuid == sa.bindparam("the_uuid"), _DELETE.attempts == sa.bindparam("the_attempts"))
    .values(attempts=_DELETE.attempts + 1, next_try_at=sa.bindparam("next"))
)


def request_delete(tx: ApiTx, uuid: str, *, project_id: str, user_id: str, request_id: str) -> bool:
    """Accept a deletion, and cancel the build if there is one; tell whether it is the first for this instance."""
    tx.execute(_CANCEL, {"the_uuid": uuid, "now": tx.now})
    return insert_if_absent(
        tx,
        delete_requests,
        {
            "created_at": tx.now,
            "instance_uuid": uuid,
            "project_id": project_id,
            "user_id": user_id,
            "request_id": request_id,
            "next_try_at": tx.now,
            "attempts": 0,
        },
    )


def take_deletes(tx: ApiTx, most: int, retry_seconds: float) -> list[DeleteRequest]:
    """Take the deletions that are due; each is due again after `retry_seconds`, unless it is finished."""
    next_try = tx.now + timedelta(seconds=retry_seconds)
    due = [DeleteRequest(*row) for row in tx.execute(_DUE, {"now": tx.now, "most": most})]
    return [
        request
        for request in due
        if tx.execute(
            _TRY, {"the_uuid": request.instance_uuid, "the_attempts": request.attempts, "next": next_try}
        ).rowcount
        == 1
    ]


def finish_delete(tx: ApiTx, uuid: str) -> None:
    """Remove a deletion that is done, and what was asked for when the instance was made."""
    tx.execute(sa.delete(delete_requests).where(_DELETE.instance_uuid == uuid))
    tx.execute(sa.delete(request_specs).where(request_specs.c.instance_uuid == uuid))
