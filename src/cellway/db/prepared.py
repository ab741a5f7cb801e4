"""Statements for the hottest reads, compiled once and run on the driver's own cursor.

SQLAlchemy costs some 20 µs a statement over what the driver costs: more than both reads of a server. `Prepared`
leaves out what it does anew for every execution, and keeps its compiler, its types and its errors. The nouns whose
reads answer nearly every request use it; everything else uses `Tx.execute`. It opens no connection and no transaction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from cellway.db.transaction import Tx

Values = Sequence[Any]
"""The columns of a row, in the order of the statement."""


class _Form(NamedTuple):
    """A statement as one dialect's driver takes it."""

    text: str
    constants: Mapping[str, Any]
    order: Sequence[str] | None
    """The parameters' names by position; None for a driver that takes them by name."""
    processors: Sequence[tuple[int, Callable[[Any], Any]]]
    """What turns the driver's values into Python's, by column."""


class Prepared:
    """A SELECT whose parameters are plain text or whole numbers: no lists, and no types that convert what they bind."""

    def __init__(self, statement: sa.Select[Any] | sa.CompoundSelect[Any]) -> None:
        self._statement = statement
        self._forms: dict[str, _Form] = {}

    def rows(self, tx: Tx, parameters: Mapping[str, str | int]) -> Sequence[Values]:
        """Run it and return every row. Raises: as `Tx.execute`."""
        connection = tx.connection
        dialect = connection.dialect
        form = self._forms.get(dialect.name) or self._compile(dialect)
        values: Any = {**form.constants, **parameters}
        if form.order is not None:
            values = tuple([values[name] for name in form.order])
        raw = connection.connection
        cursor = raw.cursor()
        try:
            dialect.do_execute(cursor, form.text, values)
            found = cursor.fetchall()
        except dialect.loaded_dbapi.Error as error:
            lost = dialect.is_disconnect(error, raw, cursor)
            if lost:
                connection.invalidate(error)
            raise DBAPIError.instance(
                form.text, None, error, dialect.loaded_dbapi.Error,
                hide_parameters=True, connection_invalidated=lost, dialect=dialect,
            ) from error  # fmt: skip
        finally:
            cursor.close()
        return [_converted(row, form.processors) for row in found] if form.processors else found

    def first(self, tx: Tx, parameters: Mapping[str, str | int]) -> Values | None:
        """Run it and return the first row, if there is one. Raises: as `Tx.execute`."""
        found = self.rows(tx, parameters)
        return found[0] if found else None

    def _compile(self, dialect: sa.Dialect) -> _Form:
        compiled = self._statement.compile(dialect=dialect)
        processors = [
            (index, processor)
            for index, column in enumerate(self._statement.selected_columns)
            if (processor := column.type.dialect_impl(dialect).result_processor(dialect, None)) is not None
        ]
        # Threads may do this at the same time: they come to the same form.
        form = self._forms[dialect.name] = _Form(str(compiled), compiled.params, compiled.positiontup, processors)
        return form


def _converted(row: Values, processors: Sequence[tuple[int, Callable[[Any], Any]]]) -> Values:
    values = list(row)
    for index, process in processors:
        values[index] = process(values[index])
    return values
