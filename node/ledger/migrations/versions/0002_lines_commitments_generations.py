"""Lines to peers, storage commitment, urgent analyses, superseded objects, series whose files were dropped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change the tables."""
    # Columns are added in place: a table that is copied and dropped would take the rows with it that refer to it.
    op.add_column("series", sa.Column("dropped_at", sa.Double(), nullable=True))
    op.add_column("analyses", sa.Column("urgent", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("objects", sa.Column("superseded_by", sa.Integer(), nullable=True))
    op.add_column("deliveries", sa.Column("stored_at", sa.Double(), nullable=True))
    op.add_column("deliveries", sa.Column("asks", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("deliveries", sa.Column("transaction_uid", sa.Text(), nullable=True))
    op.create_index("ix_deliveries_peer", "deliveries", ["peer"])
    op.create_table(
        "lines",
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("silent_since", sa.Double(), nullable=True),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("rung_at", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("peer"),
    )
    op.create_index("ix_lines_state", "lines", ["state"])
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("answered_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("transaction_uid"),
    )


def downgrade() -> None:
    """Change them back."""
    op.drop_table("commitments")
    op.drop_table("lines")
    op.drop_index("ix_deliveries_peer", "deliveries")
    for name in ("transaction_uid", "asks", "stored_at"):
        op.drop_column("deliveries", name)
    op.drop_column("objects", "superseded_by")
    op.drop_column("analyses", "urgent")
    op.drop_column("series", "dropped_at")
