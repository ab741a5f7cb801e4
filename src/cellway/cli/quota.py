"""`cellway quota`: what projects may have and have, and whether that is what there is. Projects and users are ids."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cellway.app import Application
from cellway.cli.deployment import ConfigOption, DataOption, opened
from cellway.cli.output import Format, FormatOption, note, print_records
from cellway.compute.audit import Audit, Drift
from cellway.context import RequestContext, service_context
from cellway.errors import Invalid
from cellway.ids import RequestId
from cellway.quota.limits import DEFAULT_CLASS, RESOURCES, UNLIMITED, Level, Source
from cellway.quota.usage import Usage

T = TypeVar("T")

app = typer.Typer(help="Show, set, count and verify quotas.", no_args_is_help=True, rich_markup_mode=None)

LIMITS = ("resource", "limit", "source")
USAGE = ("resource", "limit", "in_use", "reserved", "headroom")
DRIFT = ("kind", "project", "user", "subject", "stored", "counted")

ProjectArgument = Annotated[str, typer.Argument(help="Id of the project.")]
MaybeProject = Annotated[str | None, typer.Argument(help="Id of the project.")]
UserOption = Annotated[
    str | None, typer.Option("--user", help="Id of a user: what it may have, or has, in the project.")
]
ClassOption = Annotated[str | None, typer.Option("--class", help="Name of a quota class, instead of a project.")]
Limit = Annotated[int | None, typer.Option(min=UNLIMITED, help="-1 is unlimited.")]


@app.command()
def show(
    project: MaybeProject = None,
    user: UserOption = None,
    class_name: ClassOption = None,
    default: Annotated[
        bool, typer.Option("--default", help="What a project has that has no limits of its own.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show limits, and where each is found: user, project, class, default, configuration, or still in a cell."""
    of_class = DEFAULT_CLASS if default and class_name is None else class_name
    _check_owner(project, user, of_class)

    async def explain(application: Application, context: RequestContext) -> dict[str, Source]:
        if project is None:
            return await application.quotas.explain(context, "", "", of_class or DEFAULT_CLASS, up_to=Level.CLASS)
        return await application.quotas.explain(
            context, project, user or "", up_to=Level.PROJECT if user is None else Level.USER
        )

    found = _run(config, data, explain)
    records = [
        {
            "resource": resource,
            "limit": found[resource].limit,
            "source": found[resource].level.name.lower() + (" (in a cell)" if found[resource].in_cell else ""),
        }
        for resource in RESOURCES
    ]
    print_records("quota.show", records, LIMITS, form)


@app.command("set")
def set_(
    project: MaybeProject = None,
    user: UserOption = None,
    class_name: ClassOption = None,
    instances: Limit = None,
    cores: Limit = None,
    ram: Limit = None,
    metadata_items: Limit = None,
    injected_files: Limit = None,
    injected_file_content_bytes: Limit = None,
    injected_file_path_bytes: Limit = None,
    key_pairs: Limit = None,
    server_groups: Limit = None,
    server_group_members: Limit = None,
    force: Annotated[bool, typer.Option("--force", help="Also below what is used, or above the project's.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Set limits of a project, of a user in it, or of a class: all that are given, or none."""
    _check_owner(project, user, class_name)
    given = {
        "instances": instances,
        "cores": cores,
        "ram": ram,
        "metadata_items": metadata_items,
        "injected_files": injected_files,
        "injected_file_content_bytes": injected_file_content_bytes,
        "injected_file_path_bytes": injected_file_path_bytes,
        "key_pairs": key_pairs,
        "server_groups": server_groups,
        "server_group_members": server_group_members,
    }
    wanted = {resource: limit for resource, limit in given.items() if limit is not None}
    if not wanted:
        raise Invalid("quota.nothing_to_set", "no limit is given: --instances N, --cores N, …")

    async def change(application: Application, context: RequestContext) -> None:
        if project is None:
            await application.quotas.set_class_limits(context, class_name or DEFAULT_CLASS, wanted)
        else:
            await application.quotas.set_limits(context, project, user, wanted, force=force)

    _run(config, data, change)
    print_records("quota.set", [{"resource": name, "limit": limit} for name, limit in wanted.items()], LIMITS[:2], form)


@app.command()
def delete(
    project: MaybeProject = None,
    user: UserOption = None,
    class_name: ClassOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Remove the limits of a project and all its users, of one user in it, or of a class."""
    _check_owner(project, user, class_name)

    async def remove(application: Application, _context: RequestContext) -> None:
        if project is None:
            await application.quotas.delete_class_limits(class_name or DEFAULT_CLASS)
        else:
            await application.quotas.delete_limits(project, user)

    _run(config, data, remove)
    note(f"The limits of {project or class_name} are removed; what it may have now: cellway quota show")


@app.command("usage")
def usage_(
    project: ProjectArgument,
    user: UserOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Show what a project, or a user in it, has of what is counted, and how much more it may have."""

    async def read(application: Application, context: RequestContext) -> tuple[dict[str, Usage], dict[str, int]]:
        used = await application.quotas.usage(context, project, user)
        allowed = await application.quotas.allowed(context, project, user or "")
        return used, dict(allowed.project if user is None else allowed.user)

    used, limits = _run(config, data, read)
    records = [
        {
            "resource": resource,
            "limit": limits[resource],
            "in_use": has.in_use,
            "reserved": has.reserved,
            "headroom": None if limits[resource] < 0 else max(0, limits[resource] - has.total),
        }
        for resource, has in used.items()
    ]
    print_records("quota.usage", records, USAGE, form)


@app.command()
def refresh(
    project: MaybeProject = None,
    user: UserOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every project, and every user's keypairs.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Count usages anew, and mend charges that are not their servers'. Exit status 6 when a cell does not answer."""
    if (project is None) != everything or (user is not None and project is None):
        raise Invalid("quota.no_owner", "name a project, or give --all")

    async def count(application: Application, context: RequestContext) -> Sequence[str]:
        return await Audit(application.cells, application.quotas).refresh(context, project, user)

    silent = _run(config, data, count)
    records = [{"project": project or "all", "user": user}]
    print_records("quota.refresh", records, ("project", "user"), form, partial=_partial(silent))
    _end_partial(silent)


@app.command()
def verify(
    project: MaybeProject = None,
    config: ConfigOption = None,
    data: DataOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Count everything, of a project or of all, and print what differs. Exit status 8 when anything does, 6 when a cell
    does not answer.
    """

    async def count(application: Application, context: RequestContext) -> Any:
        return await Audit(application.cells, application.quotas).verify(context, project)

    report = _run(config, data, count)
    as_is = form == Format.JSON
    print_records(
        "quota.verify",
        [_record(one, as_is=as_is) for one in report.drift],
        DRIFT,
        form,
        partial=_partial(report.silent),
    )
    if report.drift:
        for name in report.silent:
            note(f"warning: {name} did not answer")
        note(f"{len(report.drift)} differ. To count anew: cellway quota refresh " + (project or "--all"))
        raise typer.Exit(8)
    _end_partial(report.silent)


def _record(drift: Drift, *, as_is: bool) -> dict[str, Any]:
    def said(numbers: Any) -> Any:
        return numbers if as_is else ", ".join(f"{name} {number}" for name, number in numbers.items()) or None

    return {
        "kind": drift.kind.value,
        "project": drift.project_id or None,
        "user": drift.user_id or None,
        "subject": drift.subject,
        "stored": said(drift.stored),
        "counted": said(drift.counted),
    }


def _partial(silent: Sequence[str]) -> list[dict[str, str]]:
    return [{"cell": name, "reason": "no answer"} for name in silent]


def _end_partial(silent: Sequence[str]) -> None:
    for name in silent:
        note(f"warning: {name} did not answer")
    if silent:
        raise typer.Exit(6)


def _check_owner(project: str | None, user: str | None, class_name: str | None) -> None:
    if (project is None) == (class_name is None) or (user is not None and project is None):
        raise Invalid("quota.no_owner", "name a project, with --user for one user in it, or a class, but not both")


def _run(config: Path | None, data: Path | None, work: Callable[[Application, RequestContext], Awaitable[T]]) -> T:
    async def run() -> T:
        async with opened(config, data) as application:
            return await work(application, service_context(RequestId("cellway-quota")))

    return asyncio.run(run())
