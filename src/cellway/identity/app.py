"""Builds the shell: one ASGI application for everything under `/identity` and `/image`, and what it serves to others.

Called by the owner. The handlers are in `keystone.py` and `images.py`, the limits and error shapes in `door.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cellway.config import Limits
from cellway.context import Clock
from cellway.errors import CellwayError
from cellway.identity.clouds import write_clouds
from cellway.identity.door import Door, Guard, on_cellway_error, on_exception, on_http_exception
from cellway.identity.images import BuiltinImages, Glance
from cellway.identity.keystone import Keystone
from cellway.identity.store import Store
from cellway.identity.tokens import Tokens
from cellway.ids import IdSource


@dataclass(frozen=True, slots=True)
class BuiltinIdentity:
    """The shell and what it offers: `tokens` is a `TokenVerifier`, `images` an `ImageCatalog`.

    `app` answers the full paths `/identity…` and `/image…`: hand it requests with the prefix left on.
    """

    app: ASGIApp
    store: Store
    tokens: Tokens
    images: BuiltinImages
    identity_url: str

    def write_clouds(self, path: Path) -> None:
        """Write the `clouds.yaml` of this deployment to `path`; first of all sets passwords where there are none.

        Raises: Invalid, NotFound, Unavailable.
        """
        write_clouds(path, self.store, self.identity_url)


def build(
    users_file: Path,
    *,
    identity_url: str,
    compute_url: str,
    image_url: str,
    limits: Limits,
    clock: Clock,
    ids: IdSource,
) -> BuiltinIdentity:
    """Open (or make) the users' file and build the shell.

    The URLs are the public ones, for links and the catalog, without a slash at the end.
    Raises: Invalid when the file cannot be read, written or understood, or may be read by others.
    """
    store = Store(users_file)
    tokens = Tokens(store, limits=limits, clock=clock)
    images = BuiltinImages()
    guard = Guard(tokens, identity_url)
    keystone = Keystone(
        store,
        tokens,
        guard,
        identity_url=identity_url,
        compute_url=compute_url,
        image_url=image_url,
        limits=limits,
    )
    glance = Glance(images, guard, image_url=image_url, limits=limits)
    app = Starlette(
        routes=[*keystone.routes(), *glance.routes()],
        exception_handlers={
            HTTPException: on_http_exception,
            CellwayError: on_cellway_error,
            Exception: on_exception,
        },
    )
    # It would redirect to an address made from the client's Host header.
    app.router.redirect_slashes = False
    return BuiltinIdentity(Door(app, limits=limits, ids=ids), store, tokens, images, identity_url)
