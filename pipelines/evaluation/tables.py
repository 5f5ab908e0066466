"""Tables that the workers of an evaluation make together."""

from __future__ import annotations

import pandas

from pipelines.distributed import Context, gather


def joined(tables: list[pandas.DataFrame], context: Context, order: list[str]) -> pandas.DataFrame:
    """Joins the tables of all workers and sorts the rows by `order`, so that the workers have no effect."""
    some = [table for of_worker in gather(tables, context) for table in of_worker if len(table)]
    if not some:
        return pandas.DataFrame(columns=order)
    return pandas.concat(some).sort_values(order, ignore_index=True)
