"""Which HTTP status an error has, and the fault body that says so. Decided here and nowhere else."""

import msgspec

from cellway.errors import (
    CellwayError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OverQuota,
    Unavailable,
)
from cellway.http.microversions import NotAcceptable


class TooLarge(CellwayError):
    """The request is longer than is taken."""


class TooSlow(CellwayError):
    """The client did not send its request in time."""


class WrongMethod(CellwayError):
    """The path exists, the method on it does not. `fields["allow"]` lists those that do."""


class WrongMediaType(CellwayError):
    """The body is not JSON."""


class NotImplementedHere(CellwayError):
    """A call of the API that this deployment does not serve."""


_STATUS: tuple[tuple[type[CellwayError], int], ...] = (
    (NotFound, 404),
    (Invalid, 400),
    (Conflict, 409),
    (Forbidden, 403),
    (OverQuota, 403),
    (Unavailable, 503),
    (NotAcceptable, 406),
    (TooLarge, 413),
    (TooSlow, 408),
    (WrongMethod, 405),
    (WrongMediaType, 415),
    (NotImplementedHere, 501),
)

_NAMES = {
    400: "badRequest",
    403: "forbidden",
    404: "itemNotFound",
    405: "badMethod",
    406: "notAcceptable",
    408: "requestTimeout",
    409: "conflictingRequest",
    413: "overLimit",
    415: "badMediaType",
    500: "computeFault",
    501: "notImplemented",
    503: "serviceUnavailable",
}

RETRY_AFTER_SECONDS = 5
"""What a 503 asks for: a healed cell serves again within this."""


def status_of(error: CellwayError) -> int:
    """Return the status of a domain error."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 500


def fault(status: int, message: str) -> bytes:
    """Return a fault document."""
    return msgspec.json.encode({_NAMES.get(status, "computeFault"): {"code": status, "message": message}})


def unauthorized() -> bytes:
    """Return the 401 body, which is the identity service's form and not a fault's."""
    return msgspec.json.encode(
        {
            "error": {
                "code": 401,
                "title": "Unauthorized",
                "message": "The request you have made requires authentication.",
            }
        }
    )
