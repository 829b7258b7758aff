"""`select`: which rows a recipe keeps, by one rule for texts, datasets, kinds and splits; and the
values of `extra`, the JSON object with a source's other columns."""

import json
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value of a table as `extra` can hold it, as JSON: a date, say, as text."""
    return json.loads(json.dumps(value, default=str))


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
