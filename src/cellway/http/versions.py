"""The documents by which clients find out which versions are spoken. They need no token."""

from typing import Any

from cellway.http import microversions
from cellway.http.routes import Handler
from cellway.http.wire import Answer, Call, answer

_UPDATED = "2013-07-23T11:33:21Z"


def _v21(call: Call) -> dict[str, Any]:
    return {
        "id": "v2.1",
        "status": "CURRENT",
        "version": microversions.text(microversions.LATEST),
        "min_version": microversions.text(microversions.OLDEST),
        "updated": _UPDATED,
        "links": [{"rel": "self", "href": f"{call.services.compute_url}/"}],
    }


async def all_versions(call: Call) -> Answer:
    """`GET /`"""
    return answer({"versions": [_v21(call)]})


async def one_version(call: Call) -> Answer:
    """`GET /v2.1`"""
    media = [{"base": "application/json", "type": "application/vnd.openstack.compute+json;version=2.1"}]
    return answer({"version": _v21(call) | {"media-types": media}})


PAGES: dict[str, Handler] = {"": all_versions, "/": all_versions, "/v2.1": one_version, "/v2.1/": one_version}
"""Path to handler, below `/compute`."""
