"""States that were derived from other columns or file names become states and columns; events become kind and data."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

#: Events that are converted at a time.
_BATCH = 1000

#: Table, its new state, and which rows are in it.
_STATES = (
    ("deliveries", "stored", "stored_at IS NOT NULL AND state IN ('waiting', 'running')"),
    ("deliveries", "unconfirmed", "stored_at IS NOT NULL AND state = 'failed'"),
    ("analyses", "report_due", "gave_up IS NOT NULL AND state = 'waiting'"),
    ("analyses", "reporting", "gave_up IS NOT NULL AND state = 'running'"),
    ("peers", "unreachable", "unreachable_since IS NOT NULL AND state = 'waiting'"),
    ("peers", "probing", "unreachable_since IS NOT NULL AND state = 'running'"),
)

#: Kinds of result object whose file name went on with the form.
_KINDS = ("infection-seg", "lung-seg", "sr", "capture", "pdf")
_STOPPED = ".stopped.dcm"


def upgrade() -> None:
    """Change the tables."""
    # Columns are renamed and added in place: a table that is copied and dropped would take the rows with it that refer
    # to it.
    op.drop_index("ix_lines_state", "lines")
    op.rename_table("lines", "peers")
    op.create_index("ix_peers_state", "peers", ["state"])
    for table, old, new in (
        ("analyses", "rung_at", "last_notified_at"),
        ("deliveries", "rung_at", "last_notified_at"),
        ("peers", "rung_at", "last_notified_at"),
        ("peers", "silent_since", "unreachable_since"),
        ("analyses", "tell", "report"),
    ):
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    op.add_column("objects", sa.Column("form", sa.Text(), nullable=False, server_default=""))
    op.add_column("objects", sa.Column("stopped", sa.Text(), nullable=True))
    op.add_column("events", sa.Column("kind", sa.Text(), nullable=False, server_default="text"))
    op.add_column("events", sa.Column("data", sa.JSON(), nullable=False, server_default="{}"))
    for table, state, where in _STATES:
        op.execute(f"UPDATE {table} SET state = '{state}' WHERE {where}")
    # No worker has what a peer has taken.
    op.execute("UPDATE deliveries SET lease_owner = NULL, lease_until = 0 WHERE state = 'stored'")
    _objects()
    _events()
    op.drop_column("events", "text")


def _objects() -> None:
    """Form, and why it was stopped, from the file name and from what its deliveries were ended with."""
    connection = op.get_bind()
    objects, deliveries = _table("objects", "id", "kind", "path", "form", "stopped"), _table("deliveries", "object_id")
    deliveries.append_column(sa.Column("reason", sa.Text()))
    for row in connection.execute(sa.select(objects.c.id, objects.c.kind, objects.c.path)).all():
        name = row.path.rsplit("/", 1)[-1]
        values: dict[str, str] = {}
        if name.endswith(_STOPPED):
            why = sa.select(deliveries.c.reason).where(deliveries.c.object_id == row.id, deliveries.c.reason != "")
            values["stopped"] = connection.scalar(why.limit(1)) or "it did not pass its check"
        form = name.removesuffix(_STOPPED).removesuffix(".dcm").removeprefix(row.kind).removeprefix("-")
        if form and row.kind in _KINDS and name.startswith(f"{row.kind}-"):
            values["form"] = form
        if values:
            connection.execute(sa.update(objects).where(objects.c.id == row.id).values(values))


def _events() -> None:
    """The text of each event becomes its data."""
    connection = op.get_bind()
    events = _table("events", "id", "text")
    events.append_column(sa.Column("data", sa.JSON()))
    last = 0
    while rows := connection.execute(
        sa.select(events.c.id, events.c.text).where(events.c.id > last).order_by(events.c.id).limit(_BATCH)
    ).all():
        change = sa.update(events).where(events.c.id == sa.bindparam("row")).values(data=sa.bindparam("now"))
        connection.execute(change, [{"row": row.id, "now": {"text": row.text}} for row in rows])
        last = rows[-1].id


def _table(name: str, *columns: str) -> sa.Table:
    """A table with some of its columns, which are texts but for the row numbers."""
    numbers = ("id", "object_id")
    made = [sa.Column(column, sa.Integer() if column in numbers else sa.Text()) for column in columns]
    return sa.Table(name, sa.MetaData(), *made)
