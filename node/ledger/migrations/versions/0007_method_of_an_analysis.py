"""An analysis is of a method; those before were of pneumonia."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the tables."""
    op.add_column("analyses", sa.Column("method", sa.Text(), nullable=False, server_default="pneumonia"))
