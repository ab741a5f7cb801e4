"""Names for the kinds of identifier that pass through the system, and the source of new ones.

Every layer uses these; this module imports nothing of ours. A `NewType` costs nothing at run time and
stops an instance's uuid from being passed where a cell's is wanted.
"""

import re
import secrets
import uuid as _uuid
from typing import NewType, Protocol

InstanceUuid = NewType("InstanceUuid", str)
CellUuid = NewType("CellUuid", str)
HostName = NewType("HostName", str)
ProjectId = NewType("ProjectId", str)
UserId = NewType("UserId", str)
RequestId = NewType("RequestId", str)

CELL0_UUID = CellUuid("00000000-0000-0000-0000-000000000000")
"""The fixed uuid of cell0, as the incumbent's databases have it."""

_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE)


class IdSource(Protocol):
    """Where new identifiers come from; an argument, so that a whole deployment can be replayed from a seed."""

    def uuid(self) -> str:
        """Return a new uuid in its canonical 36-character form."""
        ...

    def token(self) -> str:
        """Return a new short random word of lower-case letters and digits, 8 characters."""
        ...


_DRAW = 256


class RandomIds:
    """The operating system's randomness."""

    def __init__(self) -> None:
        self._drawn: list[bytes] = []

    def uuid(self) -> str:
        try:
            drawn = self._drawn.pop()
        except IndexError:
            # Many at once: every draw lets go of the interpreter, and each request needs one.
            many = secrets.token_bytes(16 * _DRAW)
            drawn, *rest = (many[start : start + 16] for start in range(0, len(many), 16))
            self._drawn += rest
        return str(_uuid.UUID(bytes=drawn, version=4))

    def token(self) -> str:
        return secrets.token_hex(4)


def is_uuid(text: str) -> bool:
    """Tell whether `text` is a uuid, with or without dashes."""
    return _UUID.fullmatch(text) is not None
