"""Keypairs over HTTP: list, show, create, delete, of the caller or, for an admin, of any user.

Handlers call the nouns of `cellway.keypairs` on the API database; `http/app.py` takes ROUTES. A private key is never
made here: clients make their own and send the public half. Seed: none of its own.
"""

from typing import Annotated, Any, Generic, TypeVar

import msgspec

from cellway import keypairs
from cellway.errors import Invalid
from cellway.http.routes import Route
from cellway.http.wire import Answer, Body, Call, answer, long_stamp
from cellway.keypairs import KeyPair, Kind

# ---- bodies ----------------------------------------------------------------------------------------------------

_KeyName = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^(?! )[a-zA-Z0-9 _.@-]+(?<! )\Z")]


class _New(Body, frozen=True, kw_only=True):
    name: _KeyName
    public_key: str | None = None


class _New2(_New, frozen=True, kw_only=True):
    type: Kind = "ssh"


class _New10(_New2, frozen=True, kw_only=True):
    user_id: Annotated[str, msgspec.Meta(max_length=255)] = ""


New = TypeVar("New", bound=_New)


class _KeyPair(Body, Generic[New], frozen=True):
    keypair: New


# ---- views -----------------------------------------------------------------------------------------------------


def _view(call: Call, keypair: KeyPair) -> dict[str, Any]:
    view = {"name": keypair.name, "public_key": keypair.public_key, "fingerprint": keypair.fingerprint}
    return view | {"type": keypair.type} if call.version >= 2 else view


# ---- handlers --------------------------------------------------------------------------------------------------


def _owner(call: Call, asked: str | None) -> str:
    """Return whose keypairs are meant: the caller's, or another user's if the caller may.

    Raises: Forbidden.
    """
    if call.version < 10 or not asked:
        return call.context.user_id
    call.require(user_id=asked)
    return asked


async def index(call: Call) -> Answer:
    """List a user's keypairs by name."""
    user = _owner(call, call.query.get("user_id"))
    if call.version < 35:
        found = await call.services.api.read(keypairs.list, user, limit=call.limits.page_size)
        return answer({"keypairs": [{"keypair": _view(call, keypair)} for keypair in found]})
    page = call.page()
    found = await call.services.api.read(keypairs.list, user, limit=page.limit, marker=page.marker)
    body: dict[str, Any] = {"keypairs": [{"keypair": _view(call, keypair)} for keypair in found]}
    links = call.next_links("os-keypairs", [keypair.name for keypair in found], page.limit)
    return answer(body | {"keypairs_links": links} if links else body)


async def show(call: Call) -> Answer:
    """Show one keypair of a user."""
    user = _owner(call, call.query.get("user_id"))
    keypair = await call.services.api.read(keypairs.get, user, call.path["name"])
    more = {
        "id": keypair.id,
        "user_id": keypair.user_id,
        "created_at": long_stamp(keypair.created_at),
        "updated_at": long_stamp(keypair.updated_at),
        "deleted": False,
        "deleted_at": None,
    }
    return answer({"keypair": _view(call, keypair) | more})


async def create(call: Call) -> Answer:
    """Keep a public key for a user."""
    new: _New
    kind: Kind = "ssh"
    user: str = call.context.user_id
    if call.version >= 10:
        new = owned = call.decode(_KeyPair[_New10]).keypair
        kind, user = owned.type, _owner(call, owned.user_id)
    elif call.version >= 2:
        new = typed = call.decode(_KeyPair[_New2]).keypair
        kind = typed.type
    else:
        new = call.decode(_KeyPair[_New]).keypair
    if new.public_key is None:
        raise Invalid(
            "keypair.public_key_required",
            "public_key is required: keys are not generated here. Generate one with your client, for example "
            "with ssh-keygen -t ed25519, and send its public half.",
        )
    keypair = await call.services.quotas.take(
        call.context, "key_pairs", ("", user), keypairs.create, user, new.name, new.public_key, kind
    )
    body = {"keypair": _view(call, keypair) | {"user_id": keypair.user_id}}
    return answer(body, 201 if call.version >= 2 else 200)


async def delete(call: Call) -> Answer:
    """Remove one keypair of a user."""
    user = _owner(call, call.query.get("user_id"))
    await call.services.quotas.give_back("key_pairs", ("", user), keypairs.delete, user, call.path["name"])
    return Answer(204 if call.version >= 2 else 202)


_RULE = "os_compute_api:os-keypairs"

ROUTES = (
    Route("GET", "/os-keypairs", index, f"{_RULE}:index"),
    Route("POST", "/os-keypairs", create, f"{_RULE}:create"),
    Route("GET", "/os-keypairs/{name}", show, f"{_RULE}:show"),
    Route("DELETE", "/os-keypairs/{name}", delete, f"{_RULE}:delete"),
)
