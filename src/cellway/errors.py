"""Every error that one layer of Cellway raises for another to handle.

Nouns raise them; wires translate their drivers' errors into them (`raise … from`); HTTP status codes are
chosen in `http/faults.py` and exit codes in `cli/main.py`, nowhere else. No message holds a URL, a password
or SQL: messages are shown to users.
"""

from collections.abc import Mapping


class CellwayError(Exception):
    """A refusal or failure with a stable dotted `code`, a sentence for people, and `fields` for programs.

    The triple crosses the message queue unchanged (`rpc/messaging.py`).
    """

    def __init__(self, code: str, message: str, **fields: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields: Mapping[str, object] = fields

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code!r}, {self.message!r})"


class NotFound(CellwayError):
    """The thing named does not exist, or the caller may not know that it does."""


class Conflict(CellwayError):
    """The request contradicts the present state: a duplicate, a wrong state, something still in use."""


class Invalid(CellwayError):
    """The request is malformed or names a value outside its range."""


class Forbidden(CellwayError):
    """The caller is known and may not do this."""


class OverQuota(CellwayError):
    """A limit would be passed."""


class Unavailable(CellwayError):
    """A part that is needed does not answer now; trying again later may work."""


class CellUnavailable(Unavailable):
    """A cell's database or message queue does not answer. `fields["cell"]` names the cell."""


class DeadlineExceeded(Unavailable):
    """No answer came in time; whether the work was done is unknown."""


class HostUnreachable(Unavailable):
    """No agent listens for this host, so the message was not accepted by the queue."""


class OutcomeUnknown(Unavailable):
    """The connection was lost while a transaction was being committed, or before a message was confirmed.

    Never retried blindly: whoever tries again looks first for the unique id that the transaction wrote.
    """


class CellNotTargeted(CellwayError):
    """A cell's database or queue was used through a context that is not targeted at any cell."""

    def __init__(self, what: str) -> None:
        super().__init__("cell.not_targeted", f"{what} needs a context that is targeted at a cell")


class CellHasNoQueue(CellwayError):
    """A message was sent to a cell without a message queue (cell0): there is no other queue to fall back to."""
