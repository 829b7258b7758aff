"""Which rows a recipe's `select` keeps: one rule for texts, datasets, kinds and splits."""

from typing import Any


def matches(row: dict[str, Any], select: dict[str, Any]) -> bool:
    """Return True if `row` has every key of `select` with the value there; a list is any of its
    values. A key is one of the row's `extra` (a dict), else a column; a row without it does not
    match, whatever the value."""
    extra = row.get("extra")
    values = {**row, **extra} if isinstance(extra, dict) else row
    return all(
        key in values
        and (values[key] in allowed if isinstance(allowed, list) else values[key] == allowed)
        for key, allowed in select.items()
    )
