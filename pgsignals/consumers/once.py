"""``once``: an event that is delivered again has no second effect."""

from __future__ import annotations

from typing import Any

from ..core.errors import ConfigurationError, DatabaseError, PrivilegeError, StateError
from ..core.events import Event
from ..dispatch.registry import called, receiver_name
from ..postgres.transaction import Borrowed, borrow, refusal

# ON CONFLICT and RETURNING name no columns, so that the INSERT privilege is enough.
_RECORD = (
    "INSERT INTO pgsignals.processed (scope, uid) VALUES (%s, %s)"
    " ON CONFLICT DO NOTHING RETURNING true"
)


def once(event: Event, connection: object, /, *, scope: str | None = None) -> bool:
    """Record, in the connection's transaction, that the event is taken care of.

    Returns True the first time, and False when that is recorded already::

        @pgsignals.on("orders", "inserted")
        def invoice(event):
            with Session() as session, session.begin():
                if pgsignals.once(event, session):
                    session.add(Invoice(order_id=event.id))

    The record is committed, or rolled back, with what the receiver writes through the same
    ``connection``, which is one that :func:`pgsignals.muted` takes, to a database that has the
    schema of durable delivery. While another transaction that recorded the same event is under way,
    it waits for its end. ``scope`` says for whom the event is taken care of: unless given, for the
    receiver that is being called, by its module and name, whichever consumer calls it.

    Raises ConfigurationError for another kind of connection, or outside a receiver of durable
    delivery without a ``scope``; StateError where no transaction is open and none would be opened
    (autocommit); DatabaseError without the schema; PrivilegeError without INSERT on its table.
    """
    if scope is None:
        if (receiver := called.get()) is None:
            raise ConfigurationError(
                "once() was not called by a receiver of durable delivery, in its thread, so that "
                "there is no name to record the event under: give scope='…'."
            )
        scope = receiver_name(receiver)
    borrowed = borrow(connection)
    if borrowed is None:
        raise ConfigurationError(refusal(connection))
    if borrowed.autocommits():
        raise StateError(
            "once() records the event in the transaction of its effect, and this connection has "
            "none: it commits each statement by itself. Begin one around both: "
            f"{borrowed.remedy}."
        )
    try:
        return bool(borrowed.execute(_RECORD, [scope, event.uid]))
    except Exception as error:
        code = _state(error)
        if code in ("42P01", "3F000"):
            raise DatabaseError(
                "once() found no table pgsignals.processed in the connection's database. Run "
                "`pgsignals install --delivery outbox` (or wal) there, or give a connection to the "
                "database that has the outbox."
            ) from error
        if code == "42501":
            role = _role(borrowed)
            raise PrivilegeError(
                f"The role {role} may not record events. Have the owner of the schema pgsignals "
                f"run: GRANT USAGE ON SCHEMA pgsignals TO {role}; GRANT INSERT ON "
                f"pgsignals.processed TO {role};"
            ) from error
        raise


def _state(error: BaseException | None) -> str | None:
    """PostgreSQL's code of an error, which SQLAlchemy and Django wrap in ones of their own."""
    seen = 0
    while error is not None and seen < 5:
        for name in ("sqlstate", "pgcode"):
            code = getattr(error, name, None)
            if isinstance(code, str):
                return code
        error = error.__cause__
        seen += 1
    return None


def _role(borrowed: Borrowed) -> str:
    """Return the role the connection was made as; the failed transaction takes no query for it."""
    info: Any = getattr(borrowed.driver(), "info", None)
    user = getattr(info, "user", None)
    return '"' + str(user).replace('"', '""') + '"' if user else "of the connection"
