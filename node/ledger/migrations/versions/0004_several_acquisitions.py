"""A series may have an analysis for each of its acquisitions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the tables."""
    op.add_column("analyses", sa.Column("acquisition", sa.Text(), nullable=False, server_default=""))
    # SQLite cannot drop a constraint: the table is made anew, and its rows wait elsewhere meanwhile. What refers to
    # them is looked at when all is done (https://www.sqlite.org/foreignkeys.html, 4.2 and 5).
    op.execute("PRAGMA defer_foreign_keys = ON")
    table = sa.Table("analyses", sa.MetaData(), autoload_with=op.get_bind())
    table.constraints = {one for one in table.constraints if not isinstance(one, sa.UniqueConstraint)}
    table.append_constraint(sa.UniqueConstraint("series_id", "route", "acquisition"))
    op.execute("CREATE TEMPORARY TABLE waiting AS SELECT * FROM analyses")
    op.execute("DELETE FROM analyses")
    op.execute("DROP TABLE analyses")
    table.create(op.get_bind())
    columns = ", ".join(column.name for column in table.columns)
    op.execute(f"INSERT INTO analyses ({columns}) SELECT {columns} FROM waiting")
    op.execute("DROP TABLE waiting")
