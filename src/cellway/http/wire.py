"""What every handler works with: the `Call` it is given, the `Answer` it returns, and the shapes they share.

Decoding refuses everything hostile with a 400; links come from the configured public endpoint, never from the
request's own address; timestamps have the incumbent's two forms. Handlers live one resource to a file beside this.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from starlette.datastructures import QueryParams

from cellway.config import Limits
from cellway.context import RequestContext
from cellway.errors import Invalid
from cellway.http.policy import Policy, Target

if TYPE_CHECKING:
    from cellway.http.app import Services

T = TypeVar("T")

INT_MAX = 0x7FFFFFFF
"""The incumbent's largest integer, and its databases' columns'."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^(?!\s)[^\x00-\x1f\x7f]*(?<!\s)\Z")]
"""1 to 255 printable characters without blanks at either end."""
Description = Annotated[str, msgspec.Meta(max_length=65535)]
MetadataKey = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9-_:. ]{1,255}\Z")]
"""The incumbent's keys: whatever else a key held, its own address could not name it."""
Metadata = dict[MetadataKey, Annotated[str, msgspec.Meta(max_length=255)]]


class Body(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A request body, or a part of one: an unknown key is refused."""


class Answer(NamedTuple):
    """A handler's answer. `body` is JSON, or empty."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Link(msgspec.Struct, frozen=True):
    """A link as the API writes it."""

    rel: str
    href: str


@dataclass(slots=True)
class Call:
    """One request: who asks, at which microversion (`version` 53 is 2.53), for what, and what to answer with."""

    context: RequestContext
    version: int
    rule: str
    path: dict[str, str]
    query: QueryParams
    body: bytes
    services: "Services"

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self.services.limits

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.services.policy

    def decode(self, kind: type[T]) -> T:
        """Return the body as `kind`.

        Raises: Invalid for anything that is not exactly that.
        """
        return decode(self.body, kind, self.limits.json_depth)

    def require(self, *, project_id: str | None = None, user_id: str | None = None, rule: str | None = None) -> None:
        """Check the route's rule, or another, against an object's owner.

        Raises: Forbidden.
        """
        self.policy.require(rule or self.rule, self.context, Target(project_id=project_id, user_id=user_id))

    def allows(self, rule: str, *, project_id: str | None = None, user_id: str | None = None) -> bool:
        """Tell whether the caller may do what `rule` guards."""
        return self.policy.allows(rule, self.context, Target(project_id=project_id, user_id=user_id))

    def links(self, collection: str, key: object) -> list[Link]:
        """Return the `self` and `bookmark` links of an object."""
        path = f"{collection}/{quote(str(key), safe='')}"
        return [
            Link("self", f"{self.services.compute_url}/{path}"),
            Link("bookmark", f"{self.services.bookmark_url}/{path}"),
        ]

    def bookmark(self, collection: str, key: object) -> list[Link]:
        """Return the `bookmark` link alone."""
        return [Link("bookmark", f"{self.services.bookmark_url}/{collection}/{quote(str(key), safe='')}")]

    def page(self) -> "Page":
        """Return the page that the query asks for.

        Raises: Invalid for a limit that is not a number from 0.
        """
        most = self.limits.page_size
        text = self.query.get("limit")
        if text is None:
            return Page(most, self.query.get("marker"))
        return Page(min(integer(text, "limit") or most, most), self.query.get("marker"))

    def next_links(self, path: str, keys: Sequence[object], limit: int) -> list[Link] | None:
        """Return the link to the next page when this one, whose items have `keys`, is full."""
        if not keys or len(keys) < limit:
            return None
        query = [(key, value) for key, value in self.query.multi_items() if key != "marker"]
        query.append(("marker", str(keys[-1])))
        return [Link("next", f"{self.services.compute_url}/{path}?{urlencode(query)}")]


class Page(NamedTuple):
    """At most `limit` items that follow the item `marker`."""

    limit: int
    marker: str | None


_encoder = msgspec.json.Encoder()


def answer(value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return `value` as a JSON answer."""
    return Answer(status, _encoder.encode(value), tuple(headers))


def decode(body: bytes, kind: type[T], depth: int) -> T:
    """Decode a JSON body as `kind`, refusing NULs, invalid UTF-8, too deep nesting and everything unknown.

    Raises: Invalid.
    """
    if body.count(b"{") + body.count(b"[") > depth and _is_deeper(body, depth):
        raise Invalid("request.too_deep", f"The request body is nested deeper than {depth} levels")
    try:
        if b"\\u0000" in body and _holds_nul(msgspec.json.decode(body)):
            raise Invalid("request.nul", "The request body holds a NUL character")
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Invalid("request.invalid", f"Invalid input: {_without_surrogates(str(error))}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(
            "request.malformed", "The server could not understand the request body: malformed JSON"
        ) from error


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_deeper(body: bytes, depth: int) -> bool:
    level = 0
    inside = escaped = False
    for byte in body:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in (0x7B, 0x5B):
            level += 1
            if level > depth:
                return True
        elif byte in (0x7D, 0x5D):
            level -= 1
    return False


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    if isinstance(value, list):
        return any(_holds_nul(item) for item in value)
    return False


def integer(text: str, name: str) -> int:
    """Return a query parameter as a whole number from 0.

    Raises: Invalid.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(INT_MAX)) or int(text) > INT_MAX:
        raise Invalid("request.bad_parameter", f"{name} must be a whole number from 0 to {INT_MAX}", parameter=name)
    return int(text)


_TRUE = {"1", "t", "true", "on", "y", "yes"}
_FALSE = {"0", "f", "false", "off", "n", "no"}


def boolean(text: str, name: str) -> bool:
    """Return a query parameter as a truth value, in any of the incumbent's spellings.

    Raises: Invalid.
    """
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise Invalid("request.bad_parameter", f"{name} must be true or false", parameter=name)


def stamp(moment: datetime | None) -> str | None:
    """Return a server's timestamp: `2013-09-03T04:01:32Z`."""
    return moment.isoformat(timespec="seconds") + "Z" if moment is not None else None


def long_stamp(moment: datetime | None) -> str | None:
    """Return the other resources' timestamp: `2013-08-18T12:17:55.751757`."""
    return moment.isoformat(timespec="microseconds") if moment is not None else None


_BLANK_ZONE = re.compile(r"(?<=\d) (?=\d{2}:?\d{2}$)")


def moment(text: str, name: str) -> datetime:
    """Return a query parameter as a naive UTC time, from ISO 8601. A `+` that arrived as a blank is understood.

    Raises: Invalid.
    """
    try:
        parsed = datetime.fromisoformat(_BLANK_ZONE.sub("+", text))
        return parsed.astimezone(UTC).replace(tzinfo=None) if parsed.tzinfo else parsed
    except (ValueError, OverflowError):
        raise Invalid("request.bad_parameter", f"{name} must be a time in ISO 8601", parameter=name) from None
