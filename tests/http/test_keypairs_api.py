"""Keypairs over HTTP: whose they are, what each microversion shows, and what is refused."""

from typing import Any

import pytest

from cellway.testing import Client, Deployment

pytestmark = pytest.mark.anyio

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO6GvGmyMHkN4jhGqfHsUCbEf0mGfnsdGUJYkUxSNkEd somebody@somewhere"


@pytest.fixture(scope="module")
async def owner(shared: Deployment, anyio_backend: str) -> Client:
    """A reader, who may have keypairs as everybody may."""
    return await shared.add_user("key-owner", "keys", "reader")


async def make(client: Client, name: str, **more: Any) -> Any:
    """Keep a key and return what the API says of it."""
    answer = await client.post("/os-keypairs", {"keypair": {"name": name, "public_key": KEY} | more})
    assert answer.status in (200, 201), answer.body
    return answer.json["keypair"]


async def names(client: Client, query: str = "") -> list[str]:
    """Return the names that a list gives."""
    answer = await client.get(f"/os-keypairs{query}")
    assert answer.status == 200, answer.body
    return [one["keypair"]["name"] for one in answer.json["keypairs"]]


async def test_a_keypair_is_made_shown_listed_and_deleted(owner: Client) -> None:
    """A public key is kept under its name with its fingerprint until it is deleted."""
    made = await make(owner, "mine")
    assert set(made) == {"name", "public_key", "fingerprint", "type", "user_id"}
    assert (made["name"], made["public_key"], made["type"]) == ("mine", KEY, "ssh")
    assert len(made["fingerprint"].split(":")) == 16
    shown = (await owner.get("/os-keypairs/mine")).json["keypair"]
    assert made.items() <= shown.items()
    assert set(shown) - set(made) == {"id", "created_at", "updated_at", "deleted", "deleted_at"}
    assert (shown["deleted"], shown["deleted_at"], shown["updated_at"]) == (False, None, None)
    assert len(shown["created_at"]) == len("2013-08-18T12:17:55.751757")
    assert await names(owner) == ["mine"]
    answer = await owner.post("/os-keypairs", {"keypair": {"name": "mine", "public_key": KEY}})
    assert (answer.status, answer.json["conflictingRequest"]["message"]) == (409, "Key pair 'mine' already exists.")
    deleted = await owner.delete("/os-keypairs/mine")
    assert (deleted.status, deleted.body) == (204, b"")
    for method in ("GET", "DELETE"):
        assert (await owner.request(method, "/os-keypairs/mine")).status == 404
    assert await names(owner) == []


async def test_the_first_version_has_other_statuses_and_no_type(owner: Client) -> None:
    """At 2.1 a create is a 200, a delete a 202, and there is no type."""
    first = owner.at("2.1")
    answer = await first.post("/os-keypairs", {"keypair": {"name": "old", "public_key": KEY}})
    assert answer.status == 200
    assert set(answer.json["keypair"]) == {"name", "public_key", "fingerprint", "user_id"}
    [listed] = (await first.get("/os-keypairs")).json["keypairs"]
    assert set(listed["keypair"]) == {"name", "public_key", "fingerprint"}
    assert "type" not in (await first.get("/os-keypairs/old")).json["keypair"]
    typed = {"keypair": {"name": "typed", "public_key": KEY, "type": "ssh"}}
    assert (await first.post("/os-keypairs", typed)).status == 400
    assert (await owner.at("2.2").post("/os-keypairs", typed)).status == 201
    assert (await first.delete("/os-keypairs/old")).status == 202
    assert (await owner.at("2.2").delete("/os-keypairs/typed")).status == 204


async def test_an_admin_keeps_keys_for_others_from_2_10(shared: Deployment, owner: Client) -> None:
    """An admin names a user to act for; before 2.10 nobody can, and a member never may."""
    user = (await make(owner, "own"))["user_id"]
    theirs = await make(shared.admin, "given", user_id=user)
    assert theirs["user_id"] == user
    assert await names(owner) == ["given", "own"]
    assert await names(shared.admin, f"?user_id={user}") == ["given", "own"]
    assert "own" not in await names(shared.admin)
    assert (await shared.admin.at("2.9").get(f"/os-keypairs/own?user_id={user}")).status == 404
    assert (await shared.admin.get(f"/os-keypairs/own?user_id={user}")).status == 200
    body = {"keypair": {"name": "x", "public_key": KEY, "user_id": user}}
    assert (await shared.admin.at("2.9").post("/os-keypairs", body)).status == 400
    assert (await shared.member.post("/os-keypairs", body)).status == 403
    for method in ("GET", "DELETE"):
        assert (await shared.member.request(method, f"/os-keypairs/own?user_id={user}")).status == 403
    assert (await owner.get(f"/os-keypairs/own?user_id={user}")).status == 200
    assert (await shared.admin.delete(f"/os-keypairs/given?user_id={user}")).status == 204
    assert await names(owner) == ["own"]
    assert (await owner.delete("/os-keypairs/own")).status == 204


async def test_keypairs_are_paged_from_2_35(owner: Client) -> None:
    """Following the links gives every keypair once by name; before 2.35 there are no pages."""
    made = ["a.b", "a_b", "b@c", "d 1", "d-1"]
    for name in made:
        await make(owner, name)
    seen: list[str] = []
    address = "/os-keypairs?limit=2"
    while address:
        answer = (await owner.get(address)).json
        seen += [one["keypair"]["name"] for one in answer["keypairs"]]
        address = answer["keypairs_links"][0]["href"] if "keypairs_links" in answer else ""
    assert sorted(seen) == sorted(made)
    assert len(set(seen)) == len(seen)
    assert len(await names(owner.at("2.34"), "?limit=2&marker=nobody")) == 5
    assert await names(owner, "?limit=0") == seen
    assert await names(owner, f"?marker={seen[-1]}") == []
    for name in made:
        assert (await owner.delete(f"/os-keypairs/{name}")).status == 204


@pytest.mark.parametrize(
    "keypair",
    [
        None, {}, {"name": "k"}, {"name": "k", "public_key": None}, {"name": "k", "public_key": ""},
        {"name": "k", "public_key": "ssh-ed25519"}, {"name": "k", "public_key": "ssh-ed25519 AAAA"},
        {"name": "k", "public_key": KEY.replace("ed25519", "rsa")}, {"name": "k", "public_key": KEY + "\n" + KEY},
        {"name": "k", "public_key": "A" * 100_000}, {"name": "k", "public_key": KEY, "type": "x509"},
        {"name": "k", "public_key": KEY, "type": "pgp"}, {"name": "", "public_key": KEY},
        {"name": "k" * 256, "public_key": KEY}, {"name": " k", "public_key": KEY}, {"name": "k ", "public_key": KEY},
        {"name": "a/b", "public_key": KEY}, {"name": "ä", "public_key": KEY}, {"name": "k\x00", "public_key": KEY},
        {"name": 1, "public_key": KEY}, {"name": "k", "public_key": KEY, "private_key": "no"},
    ],
)  # fmt: skip
async def test_a_keypair_that_cannot_be_is_a_400(owner: Client, keypair: Any) -> None:
    """What is not a public key under a plain name is refused, and nothing is kept."""
    assert (await owner.post("/os-keypairs", {"keypair": keypair})).status == 400
    assert await names(owner) == []


async def test_a_long_name_is_a_name(owner: Client) -> None:
    """255 characters are kept and found again."""
    assert (await make(owner, "k" * 255))["name"] == "k" * 255
    assert (await owner.delete(f"/os-keypairs/{'k' * 255}")).status == 204


async def test_a_server_keeps_the_key_that_it_was_made_with(shared: Deployment) -> None:
    """Deleting a keypair takes nothing from the servers that have it."""
    await make(shared.member, "lasting")
    server = await shared.boot("keyed", key_name="lasting")
    assert (await shared.member.delete("/os-keypairs/lasting")).status == 204
    assert (await shared.until_status(server, "ACTIVE"))["key_name"] == "lasting"
    answer = await shared.member.delete(f"/servers/{server}")
    assert answer.status == 204
