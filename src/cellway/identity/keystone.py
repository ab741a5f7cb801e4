"""The Keystone v3 subset: tokens, and read-only projects, users, domains and roles.

Called by `app.py`, which mounts `Keystone.routes()`. One domain, `default`. A caller without the role `admin` sees
only itself and its own projects; everything else answers as if it did not exist.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Literal
from uuid import NAMESPACE_URL, uuid5

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cellway.config import Limits
from cellway.identity.door import Guard, answer, decode
from cellway.identity.store import PASSWORD_CHARACTERS, Project, Role, Store, User
from cellway.identity.tokens import Claims, Tokens, Verified

REGION = "RegionOne"
_NO_NUL = r"\A[^\x00]*\Z"
_Word = Annotated[str, msgspec.Meta(max_length=255, pattern=_NO_NUL)]
_Password = Annotated[str, msgspec.Meta(max_length=PASSWORD_CHARACTERS, pattern=_NO_NUL)]
_Token = Annotated[str, msgspec.Meta(max_length=8192)]


class DomainName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A domain by id or name."""

    id: _Word | None = None
    name: _Word | None = None

    def is_default(self) -> bool:
        """Tell whether this is the one domain there is."""
        return self.id == DOMAIN.id if self.id is not None else self.name == DOMAIN.name


DOMAIN = DomainName(id="default", name="Default")
"""The domain of every user and project."""


class ProjectName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A project by id, or by name and domain."""

    id: _Word | None = None
    name: _Word | None = None
    domain: DomainName | None = None


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user by id, or by name and domain, with the password."""

    password: _Password
    id: _Word | None = None
    name: _Word | None = None
    domain: DomainName | None = None

    def __repr__(self) -> str:
        return "Credentials(***)"


class PasswordMethod(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The method `password`."""

    user: Credentials


class TokenMethod(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The method `token`."""

    id: _Token

    def __repr__(self) -> str:
        return "TokenMethod(***)"


class Methods(msgspec.Struct, frozen=True):
    """How the caller proves who it is. Methods that are not known here may bring fields of their own."""

    methods: tuple[str, ...]
    password: PasswordMethod | None = None
    token: TokenMethod | None = None


class SystemScope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keystone's whole-system scope, which nobody has here."""

    all: bool


class TokenScope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the token is to be good for."""

    project: ProjectName | None = None
    domain: DomainName | None = None
    system: SystemScope | None = None


class Authentication(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The object `auth`."""

    identity: Methods
    scope: TokenScope | Literal["unscoped"] | None = None


class AuthenticationBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v3/auth/tokens`."""

    auth: Authentication


class Keystone:
    """The handlers. `identity_url`, `compute_url` and `image_url` are the public addresses for links and catalog."""

    def __init__(
        self,
        store: Store,
        tokens: Tokens,
        guard: Guard,
        *,
        identity_url: str,
        compute_url: str,
        image_url: str,
        limits: Limits,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._guard = guard
        self._limits = limits
        self._v3_url = f"{identity_url}/v3"
        services = (
            ("identity", "keystone", identity_url),
            ("compute", "nova", compute_url),
            ("image", "glance", image_url),
        )
        self._catalog = msgspec.Raw(msgspec.json.encode([_service(*service) for service in services]))

    def routes(self) -> list[Route]:
        """Return every route, with its full path."""
        v3 = "/identity/v3"
        return [
            Route("/identity", self.versions),
            Route("/identity/", self.versions),
            Route(v3, self.version),
            Route(f"{v3}/", self.version),
            Route(f"{v3}/auth/tokens", self.auth_tokens, methods=["POST", "GET", "DELETE"]),
            Route(f"{v3}/auth/catalog", self.catalog),
            Route(f"{v3}/auth/projects", self.own_projects),
            Route(f"{v3}/projects", self.projects),
            Route(f"{v3}/projects/{{id}}", self.project),
            Route(f"{v3}/users", self.users),
            Route(f"{v3}/users/{{id}}", self.user),
            Route(f"{v3}/users/{{id}}/projects", self.user_projects),
            Route(f"{v3}/domains", self.domains),
            Route(f"{v3}/domains/{{id}}", self.domain),
            Route(f"{v3}/roles", self.roles),
            Route(f"{v3}/roles/{{id}}", self.role),
        ]

    async def versions(self, request: Request) -> Response:
        """Answer `GET /identity`: without a token, for discovery."""
        return answer({"versions": {"values": [self._version()]}}, 300, {"Location": f"{self._v3_url}/"})

    async def version(self, request: Request) -> Response:
        """Answer `GET /identity/v3`: without a token, for discovery."""
        return answer({"version": self._version()})

    async def auth_tokens(self, request: Request) -> Response:
        """Answer `/v3/auth/tokens`: POST signs in, GET and HEAD are what services ask, DELETE revokes."""
        match request.method:
            case "POST":
                return await self._create_token(request)
            case "DELETE":
                return self._revoke_token(request)
            case _:
                return self._show_token(request)

    async def catalog(self, request: Request) -> Response:
        """Answer `GET /v3/auth/catalog`."""
        self._guard.caller(request)
        return answer({"catalog": self._catalog, "links": self._links("auth/catalog")})

    async def own_projects(self, request: Request) -> Response:
        """Answer `GET /v3/auth/projects`: those that the caller could ask a token for."""
        user, _ = self._caller(request)
        return self._list(request, "projects", map(self._project, self._projects_of(user)), "auth/projects")

    async def projects(self, request: Request) -> Response:
        """Answer `GET /v3/projects`."""
        user, is_admin = self._caller(request)
        visible = self._store.list_projects() if is_admin else self._projects_of(user)
        return self._list(request, "projects", map(self._project, visible))

    async def project(self, request: Request) -> Response:
        """Answer `GET /v3/projects/{id}`."""
        user, is_admin = self._caller(request)
        project = self._store.find_project(request.path_params["id"])
        if project is None or not (is_admin or project.id in user.grants):
            raise HTTPException(404, "Could not find project.")
        return answer({"project": self._project(project)})

    async def users(self, request: Request) -> Response:
        """Answer `GET /v3/users`."""
        user, is_admin = self._caller(request)
        visible = self._store.list_users() if is_admin else (user,)
        return self._list(request, "users", map(self._user, visible))

    async def user(self, request: Request) -> Response:
        """Answer `GET /v3/users/{id}`."""
        return answer({"user": self._user(self._visible_user(request))})

    async def user_projects(self, request: Request) -> Response:
        """Answer `GET /v3/users/{id}/projects`."""
        user = self._visible_user(request)
        return self._list(request, "projects", map(self._project, self._projects_of(user)), f"users/{user.id}/projects")

    async def domains(self, request: Request) -> Response:
        """Answer `GET /v3/domains`."""
        self._guard.caller(request)
        return self._list(request, "domains", (self._domain(),))

    async def domain(self, request: Request) -> Response:
        """Answer `GET /v3/domains/{id}`."""
        self._guard.caller(request)
        if request.path_params["id"] != DOMAIN.id:
            raise HTTPException(404, "Could not find domain.")
        return answer({"domain": self._domain()})

    async def roles(self, request: Request) -> Response:
        """Answer `GET /v3/roles`."""
        self._guard.caller(request)
        return self._list(request, "roles", map(self._role, self._store.list_roles()))

    async def role(self, request: Request) -> Response:
        """Answer `GET /v3/roles/{id}`."""
        self._guard.caller(request)
        for role in self._store.list_roles():
            if role.id == request.path_params["id"]:
                return answer({"role": self._role(role)})
        raise HTTPException(404, "Could not find role.")

    async def _create_token(self, request: Request) -> Response:
        auth = (await decode(request, AuthenticationBody, self._limits)).auth
        how = auth.identity
        if how.methods == ("password",) and how.password is not None:
            user, parent = await self._user_by_password(how.password.user), None
        elif how.methods == ("token",) and how.token is not None:
            user, parent = self._user_by_token(how.token.id)
        elif how.methods in {("password",), ("token",)}:
            raise HTTPException(400, f"Expecting to find {how.methods[0]} in identity.")
        else:
            raise self._guard.refusal("Attempted to authenticate with an unsupported method.")
        scope = auth.scope if isinstance(auth.scope, TokenScope) else TokenScope()
        project = self._scoped_project(user, scope)
        token, claims = self._tokens.issue(user, project, parent)
        return answer(self._token_body(request, claims, user, project), 201, {"X-Subject-Token": token})

    def _show_token(self, request: Request) -> Response:
        token, subject = self._subject(request)
        user = self._store.find_user(subject.claims.user_id)
        project = self._store.find_project(subject.claims.project_id)
        if user is None or project is None or project.id not in user.grants:
            raise HTTPException(404, "Could not find token.")
        return answer(self._token_body(request, subject.claims, user, project), 200, {"X-Subject-Token": token})

    def _revoke_token(self, request: Request) -> Response:
        _, subject = self._subject(request)
        self._tokens.revoke(subject.claims)
        return Response(status_code=204)

    async def _user_by_password(self, given: Credentials) -> User:
        if given.id is not None:
            user = self._store.find_user(given.id)
        elif given.name is None:
            raise HTTPException(400, "Expecting to find id or name in user.")
        elif given.domain is None:
            raise HTTPException(400, "Expecting to find domain in user.")
        else:
            user = self._store.find_user_named(given.name) if given.domain.is_default() else None
        if not await self._store.check_password(user, given.password) or user is None:
            raise self._guard.refusal()
        return user

    def _user_by_token(self, token: str) -> tuple[User, Claims]:
        parent = self._tokens.inspect(token)
        user = None if parent is None else self._store.find_user(parent.claims.user_id)
        if parent is None or user is None:
            raise self._guard.refusal()
        return user, parent.claims

    def _scoped_project(self, user: User, scope: TokenScope) -> Project:
        wanted = scope.project
        if wanted is None:
            none_asked = scope.domain is None and scope.system is None
            project = self._store.find_project(user.default_project_id) if none_asked else None
        elif wanted.id is not None:
            project = self._store.find_project(wanted.id)
        elif wanted.name is None or wanted.domain is None:
            raise HTTPException(400, "Expecting to find id, or name and domain, in project.")
        else:
            project = self._store.find_project_named(wanted.name) if wanted.domain.is_default() else None
        if project is None or project.id not in user.grants:
            raise self._guard.refusal()
        return project

    def _subject(self, request: Request) -> tuple[str, Verified]:
        caller = self._guard.caller(request)
        token = request.headers.get("x-subject-token")
        if token is None:
            raise HTTPException(400, "The header X-Subject-Token is missing.")
        subject = self._tokens.inspect(token)
        if subject is None:
            raise HTTPException(404, "Could not find token.")
        if "admin" not in caller.identity.roles and caller.claims.user_id != subject.claims.user_id:
            raise HTTPException(403, "You are not authorized to perform the requested action.")
        return token, subject

    def _caller(self, request: Request) -> tuple[User, bool]:
        """Return who asks, and whether as an administrator."""
        identity = self._guard.caller(request).identity
        user = self._store.find_user(identity.user_id)
        if user is None:
            raise self._guard.refusal()
        return user, "admin" in identity.roles

    def _visible_user(self, request: Request) -> User:
        caller, is_admin = self._caller(request)
        user = self._store.find_user(request.path_params["id"])
        if user is None or not (is_admin or user.id == caller.id):
            raise HTTPException(404, "Could not find user.")
        return user

    def _projects_of(self, user: User) -> list[Project]:
        return [project for project in self._store.list_projects() if project.id in user.grants]

    def _list(
        self, request: Request, collection: str, items: Iterable[dict[str, object]], path: str | None = None
    ) -> Response:
        query = request.query_params
        found = [
            item
            for item in items
            if all(_agrees(item[key], query[key]) for key in query if key in _FILTERS & item.keys())
        ]
        return answer({collection: found, "links": self._links(path or collection)})

    def _links(self, path: str) -> dict[str, str | None]:
        return {"next": None, "self": f"{self._v3_url}/{path}", "previous": None}

    def _version(self) -> dict[str, object]:
        return {
            "id": "v3.14",
            "status": "stable",
            "updated": "2020-04-07T00:00:00Z",
            "links": [{"rel": "self", "href": f"{self._v3_url}/"}],
            "media-types": [
                {"base": "application/json", "type": "application/vnd.openstack.identity-v3+json"},
            ],
        }

    def _token_body(self, request: Request, claims: Claims, user: User, project: Project) -> dict[str, object]:
        granted = user.grants[project.id]
        token: dict[str, object] = {
            "methods": claims.methods,
            "user": {"id": user.id, "name": user.name, "domain": DOMAIN, "password_expires_at": None},
            "project": {"id": project.id, "name": project.name, "domain": DOMAIN},
            "is_domain": False,
            "roles": [{"id": role.id, "name": role.name} for role in self._store.list_roles() if role.name in granted],
            "issued_at": _timestamp(claims.issued_at),
            "expires_at": _timestamp(claims.expires_at),
            "audit_ids": claims.audit_ids,
        }
        if "nocatalog" not in request.query_params:
            token["catalog"] = self._catalog
        return {"token": token}

    def _project(self, project: Project) -> dict[str, object]:
        return {
            "id": project.id,
            "name": project.name,
            "domain_id": DOMAIN.id,
            "parent_id": DOMAIN.id,
            "description": "",
            "enabled": True,
            "is_domain": False,
            "tags": [],
            "options": {},
            "links": {"self": f"{self._v3_url}/projects/{project.id}"},
        }

    def _user(self, user: User) -> dict[str, object]:
        return {
            "id": user.id,
            "name": user.name,
            "domain_id": DOMAIN.id,
            "default_project_id": user.default_project_id,
            "enabled": True,
            "password_expires_at": None,
            "options": {},
            "links": {"self": f"{self._v3_url}/users/{user.id}"},
        }

    def _domain(self) -> dict[str, object]:
        return {
            "id": DOMAIN.id,
            "name": DOMAIN.name,
            "description": "The default domain",
            "enabled": True,
            "tags": [],
            "options": {},
            "links": {"self": f"{self._v3_url}/domains/{DOMAIN.id}"},
        }

    def _role(self, role: Role) -> dict[str, object]:
        return {
            "id": role.id,
            "name": role.name,
            "domain_id": None,
            "description": None,
            "options": {},
            "links": {"self": f"{self._v3_url}/roles/{role.id}"},
        }


_FILTERS = frozenset({"name", "domain_id", "parent_id", "enabled", "is_domain"})


def _agrees(value: object, wanted: str) -> bool:
    return str(value).lower() == wanted.lower() if isinstance(value, bool) else value == wanted


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _service(kind: str, name: str, url: str) -> dict[str, object]:
    def stable_id(what: str) -> str:
        return uuid5(NAMESPACE_URL, f"cellway:{kind}:{what}").hex

    return {
        "id": stable_id("service"),
        "type": kind,
        "name": name,
        "endpoints": [
            {"id": stable_id(interface), "interface": interface, "region": REGION, "region_id": REGION, "url": url}
            for interface in ("public", "internal", "admin")
        ],
    }
