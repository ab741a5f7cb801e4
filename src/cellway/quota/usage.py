"""Quotas (seed 003): what each project and user is charged for its servers.

A charge is written with the accepted request and removed when the server is gone, so usage is the sum of the charges
and no cell is asked for it. Limits are not enforced yet: every limit reads as unlimited (docs/compatibility.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from cellway.db.api_tables import server_charges
from cellway.db.transaction import ApiTx


@dataclass(frozen=True, slots=True)
class Charge:
    """What one server takes of its project's and user's limits."""

    instance_uuid: str
    project_id: str
    user_id: str
    cores: int
    ram: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a project's servers take together; `ram` is in MB."""

    instances: int
    cores: int
    ram: int


_INSERT = sa.insert(server_charges)
_DELETE = sa.delete(server_charges).where(server_charges.c.instance_uuid == sa.bindparam("the_uuid"))
_SUM = sa.select(
    sa.func.coalesce(sa.func.sum(server_charges.c.instances), 0),
    sa.func.coalesce(sa.func.sum(server_charges.c.cores), 0),
    sa.func.coalesce(sa.func.sum(server_charges.c.ram), 0),
).where(server_charges.c.project_id == sa.bindparam("the_project"))


def charge(tx: ApiTx, charges: Sequence[Charge]) -> None:
    """Charge new servers."""
    tx.execute(
        _INSERT,
        [
            {
                "created_at": tx.now,
                "instance_uuid": one.instance_uuid,
                "project_id": one.project_id,
                "user_id": one.user_id,
                "instances": 1,
                "cores": one.cores,
                "ram": one.ram,
            }
            for one in charges
        ],
    )


def refund(tx: ApiTx, instance_uuid: str) -> bool:
    """Remove a server's charge, once; tell whether there was one."""
    return tx.execute(_DELETE, {"the_uuid": instance_uuid}).rowcount == 1


def usage(tx: ApiTx, project_id: str) -> Usage:
    """Return what a project's servers take."""
    instances, cores, ram = tx.execute(_SUM, {"the_project": project_id}).one()
    return Usage(int(instances), int(cores), int(ram))
