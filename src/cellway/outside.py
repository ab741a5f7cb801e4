"""What Cellway asks of the services outside it: the token verifier (identity) and the image catalogue.

`http` and `compute` depend on these protocols only. The `identity` shell implements both for the embedded mode;
a real Keystone and Glance can take their place. Protocols and records only: nothing here does any work.
"""

from dataclasses import dataclass
from typing import Protocol

from cellway.ids import ProjectId, UserId


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a verified token speaks for. The only source of user, project and roles."""

    user_id: UserId
    user_name: str
    project_id: ProjectId
    project_name: str
    roles: frozenset[str]


class TokenVerifier(Protocol):
    """The identity service, as a question."""

    async def verify(self, token: str) -> Identity | None:
        """Return who holds `token`, or None when it is invalid, expired or revoked.

        Raises: Unavailable when the identity service does not answer; an outage is never "invalid".
        """
        ...


class ProjectDirectory(Protocol):
    """Which projects there are, as a question to the identity service."""

    async def has_project(self, project_id: str) -> bool:
        """Tell whether there is such a project. Raises: Unavailable when the identity service does not answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a build must know of an image."""

    id: str
    name: str
    min_ram_mb: int = 0
    min_disk_gb: int = 0


class ImageCatalog(Protocol):
    """The image service, as a question."""

    async def find(self, image_id: str) -> Image | None:
        """Return the usable image with this id, or None.

        Raises: Unavailable when the image service does not answer.
        """
        ...
