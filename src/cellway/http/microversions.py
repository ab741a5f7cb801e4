"""Which microversions are spoken, and how one is negotiated.

A version stands for "every difference that it makes to what we serve is implemented" (docs/decisions/0013).
Advertising a later one is changing LATEST here, once the handlers and routes tell it apart.
"""

import re

from cellway.errors import CellwayError, Invalid

OLDEST = 1
LATEST = 53
"""2.53. Handlers and routes compare the minor number alone."""

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,5})", re.ASCII)


class NotAcceptable(CellwayError):
    """The client asks for a version that is not spoken."""


def text(minor: int) -> str:
    """Return a minor number as the API writes versions: `2.53`."""
    return f"2.{minor}"


def negotiate(header: str | None, legacy_header: str | None) -> int:
    """Return the minor version that the two headers ask for; none means the oldest.

    `header` is OpenStack-API-Version (`compute 2.53`, perhaps beside other services'), `legacy_header` is
    X-OpenStack-Nova-API-Version (`2.53`); the first wins. Raises: Invalid when malformed; NotAcceptable out of range.
    """
    wanted = legacy_header
    for part in (header or "").split(","):
        service, _, version = part.strip().partition(" ")
        if service.lower() == "compute":
            wanted = version.strip()
            break
    if wanted is None:
        return OLDEST
    if wanted.lower() == "latest":
        return LATEST
    match = _VERSION.fullmatch(wanted.strip())
    if match is None:
        shown = wanted[:32].encode("ascii", "replace").decode()
        raise Invalid(
            "version.malformed",
            f"API Version String {shown} is of invalid format. Must be of format MajorNum.MinorNum.",
        )
    major, minor = int(match[1]), int(match[2])
    if major != 2 or not OLDEST <= minor <= LATEST:
        raise NotAcceptable(
            "version.not_supported",
            f"Version {wanted} is not supported by the API. Minimum is {text(OLDEST)} and maximum is {text(LATEST)}.",
        )
    return minor
