"""Short audits for the tests of what is made of them."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from rowgrad.data.readers import read_table
from rowgrad.data.table import Table
from rowgrad.training.audited import AuditRun, audit_table
from rowgrad.training.settings import Settings


def digits_run(flip: float = 0.1) -> AuditRun:
    """A few epochs on the images of digits."""
    return audit_table(read_table("digits"), Settings(epochs=6), flip=flip, rows=0.4)


def words_run(task: str = "classification", flip: float = 0.1, n: int = 120, **options) -> AuditRun:
    """A table whose names and values need escaping and whose words are long."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    quantity = values[:, 0] + values[:, 1]
    is_labels = task == "classification"
    names = ("<b>bold</b> & co", "an_extraordinarily_long_column_name_without_a_single_space_in_it_at_all", "naïve")
    words = ["x" * 90 if k % 7 == 0 else f"<script>alert({k % 5})</script>" for k in range(n)]
    frame = pl.DataFrame(values.numpy(), schema=list(names)).with_columns(pl.Series("word", words))
    table = Table(
        name="<i>words</i>.csv",
        features=values,
        feature_names=names,
        targets=(quantity > 0).long() if is_labels else quantity,
        target_name="a <target>",
        classes=("no & never", "a_rather_long_label_without_spaces_" * 2) if is_labels else None,
        place="line",
        numbers=np.arange(n) + 2,
        frame=frame,
        notes=("A note with <angle> brackets.",),
    )
    return audit_table(table, Settings(epochs=4, hidden=(16,)), flip=flip, **options)
