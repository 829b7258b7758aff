"""`select`: which rows a recipe keeps, by one rule for texts, datasets, kinds and splits; and the
values of `extra`, the JSON object with a source's other columns."""

import json
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value of a table as `extra` can hold it, as JSON: a date, say, as text. Raises
    ValueError for NaN and infinity, which are no JSON."""
    try:
        return json.loads(json.dumps(value, default=str, allow_nan=False))
    except ValueError:
        raise ValueError(f"bad value: {value!r:.40} has NaN or infinity, no JSON") from None


def matches(row: dict[str, Any], select: dict[str, Any]) -> bool:
    """Return True if `row` has for every key of `select` the value there; a list is any of its
    values. A key is one of the row's `extra` (a dict), else a column. Null is no value: it matches
    a row in which the key is null or absent."""
    extra = row.get("extra")
    values = {**row, **extra} if isinstance(extra, dict) else row
    return all(
        value in allowed if isinstance(allowed, list) else value == allowed
        for key, allowed in select.items()
        for value in (values.get(key),)
    )
