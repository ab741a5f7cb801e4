"""The row of the route table. `http/app.py` gathers the rows of all resources into ROUTES."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from cellway.http.wire import Answer, Call

Handler = Callable[[Call], Awaitable[Answer]]


class Route(NamedTuple):
    """One call of the API: which method and path, who answers, which policy rule guards it, at which microversions."""

    method: str
    path: str
    handler: Handler
    rule: str
    since: int = 1
    until: int | None = None
