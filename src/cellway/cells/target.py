"""Targeting: the only place that sets both connections of a context (seeds 000 and 001).

`Cells.target_cell` calls this for every visit to a cell. No I/O happens here: the database and the transport are
leased, and opened by their first use.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from cellway.config import Secret
from cellway.context import CellContext, CellRef, RequestContext, Transport
from cellway.db.engines import Databases, connection_key
from cellway.errors import CellUnavailable, Invalid
from cellway.ids import CellUuid
from cellway.rpc.transport import Transports


class Target(Protocol):
    """What is needed to reach a cell."""

    @property
    def ref(self) -> CellRef: ...
    @property
    def database_key(self) -> str: ...
    @property
    def database_url(self) -> Secret: ...
    @property
    def transport_url(self) -> Secret: ...


@dataclass(frozen=True, slots=True)
class OwnCell:
    """A cell as its own conductor knows it: by the conductor's configuration, without the API database."""

    ref: CellRef
    database_key: str
    database_url: Secret = field(repr=False)
    transport_url: Secret = field(repr=False)

    @classmethod
    def of(cls, name: str, database_url: Secret, transport_url: Secret) -> "OwnCell":
        """Return the cell of that name. Its uuid is made up, since the API database has the real one."""
        made_up = CellUuid(str(uuid.uuid5(uuid.NAMESPACE_OID, f"cellway:{name}")))
        return cls(CellRef(made_up, name), connection_key(made_up, database_url), database_url, transport_url)


@contextmanager
def target_cell(
    context: RequestContext, cell: Target, databases: Databases, transports: Transports
) -> Iterator[CellContext]:
    """Give a new context with both connections set; `context` itself stays as it was.

    On exit the leases are given back, so that a replaced connection can close once nobody uses it.

    Raises: CellUnavailable for a transport URL that cannot be used; Unavailable when too many cells are in use at once.
    """
    databases.lease(cell.database_key, cell.ref, cell.database_url)
    try:
        transport = _lease_transport(cell, transports)
        try:
            yield CellContext(
                user_id=context.user_id,
                project_id=context.project_id,
                request_id=context.request_id,
                roles=context.roles,
                cell=cell.ref,
                db_connection=cell.database_key,
                mq_connection=transport,
            )
        finally:
            transports.release(transport)
    finally:
        databases.release(cell.database_key)


def _lease_transport(cell: Target, transports: Transports) -> Transport:
    try:
        return transports.lease(cell.transport_url)
    except Invalid as error:
        name = cell.ref.name
        raise CellUnavailable("cell.misconfigured", f"Cell {name}: {error.message}", cell=name) from error
