"""The built-in images and the read-only Glance v2 subset that shows them.

`BuiltinImages` is the `ImageCatalog` of the embedded mode; `Glance.routes()` is mounted by `app.py`. Hosts are
simulated there, so an image is a description: its bytes are served to nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cellway.config import Limits
from cellway.identity.door import Guard, answer
from cellway.outside import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinImage(Image):
    """An image with all that Glance tells of it."""

    size_bytes: int
    md5: str
    sha512: str
    created_at: str


TINY = BuiltinImage(
    id="7f3c1f52-7c1b-4c59-9d0e-5a4b3f0c7e11",
    name="tiny",
    size_bytes=1 << 20,
    md5="b6d81b360a5672d80c27430f39153e2c",
    sha512="d6292685b380e338e025b3415a90fe8f9d39a46e7bdba8cb78c50a338cefca741f69e4e46411c32de1afdedfb268e579a51f81ff85e56f55b0ee7c33fe8c25c9",
    created_at="2026-11-01T00:00:00Z",
)
"""One mebibyte of zeros."""


class BuiltinImages:
    """The image catalogue of the embedded mode."""

    def __init__(self, images: Sequence[BuiltinImage] = (TINY,)) -> None:
        self._images = {image.id: image for image in images}

    async def find(self, image_id: str) -> BuiltinImage | None:
        """Return the image with this id, or None."""
        return self._images.get(image_id)

    def list(self) -> tuple[BuiltinImage, ...]:
        """Return all images."""
        return tuple(self._images.values())


class Glance:
    """The handlers. `image_url` is the public address for links."""

    def __init__(self, images: BuiltinImages, guard: Guard, *, image_url: str, limits: Limits) -> None:
        self._images = images
        self._guard = guard
        self._image_url = image_url
        self._page_size = limits.page_size

    def routes(self) -> list[Route]:
        """Return every route, with its full path."""
        return [
            Route("/image", self.versions),
            Route("/image/", self.versions),
            Route("/image/versions", self.versions),
            Route("/image/v2/images", self.index),
            Route("/image/v2/images/{id}", self.show),
        ]

    async def versions(self, request: Request) -> Response:
        """Answer `GET /image`: without a token, for discovery."""
        link = {"rel": "self", "href": f"{self._image_url}/v2/"}
        return answer({"versions": [{"id": "v2.7", "status": "CURRENT", "links": [link]}]}, 300)

    async def index(self, request: Request) -> Response:
        """Answer `GET /v2/images`: filters, sorting, `limit` and `marker`."""
        self._guard.caller(request)
        query = request.query_params
        found = [image for image in map(_view, self._images.list()) if _fits(image, query)]
        _sort(found, query)
        marker = query.get("marker")
        if marker is not None:
            at = next((at for at, image in enumerate(found) if image["id"] == marker), None)
            if at is None:
                raise HTTPException(400, "The marker is not an image of this list.")
            found = found[at + 1 :]
        limit = min(_number(query.get("limit", str(self._page_size)), "limit"), self._page_size)
        others = [(key, value) for key, value in query.multi_items() if key not in {"marker", "limit"}]
        body = {"images": found[:limit], "first": _page(others), "schema": "/v2/schemas/images"}
        if 0 < limit < len(found):
            body["next"] = _page([*others, ("limit", str(limit)), ("marker", str(found[limit - 1]["id"]))])
        return answer(body)

    async def show(self, request: Request) -> Response:
        """Answer `GET /v2/images/{id}`."""
        self._guard.caller(request)
        image = await self._images.find(request.path_params["id"])
        if image is None:
            raise HTTPException(404, "Could not find image.")
        return answer(_view(image))


def _view(image: BuiltinImage) -> dict[str, Any]:
    return {
        "id": image.id,
        "name": image.name,
        "status": "active",
        "visibility": "public",
        "protected": True,
        "os_hidden": False,
        "owner": None,
        "disk_format": "raw",
        "container_format": "bare",
        "min_disk": image.min_disk_gb,
        "min_ram": image.min_ram_mb,
        "size": image.size_bytes,
        "virtual_size": image.size_bytes,
        "checksum": image.md5,
        "os_hash_algo": "sha512",
        "os_hash_value": image.sha512,
        "tags": [],
        "created_at": image.created_at,
        "updated_at": image.created_at,
        "self": f"/v2/images/{image.id}",
        "schema": "/v2/schemas/image",
    }


_PAGING = frozenset({"limit", "marker", "sort", "sort_key", "sort_dir", "member_status"})
_LISTABLE = frozenset({"id", "name", "status", "disk_format", "container_format"})
_SORT_KEYS = frozenset({"id", "name", "status", "size", "disk_format", "container_format", "created_at", "updated_at"})


def _fits(image: dict[str, Any], query: QueryParams) -> bool:
    return all(_fits_one(image, key, value) for key, value in query.multi_items() if key not in _PAGING)


def _fits_one(image: dict[str, Any], key: str, wanted: str) -> bool:
    if key == "visibility" and wanted == "all":
        return True
    if key == "size_min":
        return bool(image["size"] >= _number(wanted, key))
    if key == "size_max":
        return bool(image["size"] <= _number(wanted, key))
    if key in _LISTABLE and wanted.startswith("in:"):
        return image[key] in wanted.removeprefix("in:").split(",")
    if key not in image:
        # A property or a tag; built-in images have none.
        return False
    return str(image[key]).lower() == wanted.lower() if isinstance(image[key], bool) else str(image[key]) == wanted


def _sort(images: list[dict[str, Any]], query: QueryParams) -> None:
    """Sort in place by `sort=name:asc,id`, or by pairs of `sort_key` and `sort_dir`; the newest first by default."""
    if "sort" in query:
        orders = [order.partition(":")[::2] for order in query["sort"].split(",")]
    else:
        directions = query.getlist("sort_dir")
        keys = query.getlist("sort_key") or ["created_at"]
        orders = [(key, directions[min(at, len(directions) - 1)] if directions else "") for at, key in enumerate(keys)]
    for key, direction in reversed(orders):
        if key not in _SORT_KEYS or direction not in {"", "asc", "desc"}:
            raise HTTPException(400, "The images cannot be sorted in that way.")
        images.sort(key=lambda image: image[key], reverse=direction != "asc")


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HTTPException(400, f"{name} must be a whole number and not negative.")
    return int(text)


def _page(query: Iterable[tuple[str, str]]) -> str:
    encoded = urlencode(list(query))
    return f"/v2/images?{encoded}" if encoded else "/v2/images"
