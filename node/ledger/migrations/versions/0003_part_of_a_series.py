"""An analysis may be of a part of its series."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the tables."""
    op.add_column("analyses", sa.Column("instances", sa.JSON(), nullable=True))
    op.add_column("analyses", sa.Column("note", sa.Text(), nullable=False, server_default=""))
