"""Making one shard of curated text, as the workers of stages.curate_texts do.

In: a shard of the plan, {texts: number of its source, dropped: {number of a global step: {id:
reason}}, ...}, and the configurations {_component_, ...} of sources and steps. Out: the rows that
pass all steps, in the schema shards.CONVERSATIONS, and a reject for every other row.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from speechfuse.rows.making import component
from speechfuse.rows.rejects import FILTERED, Reject
from speechfuse.rows.shards import Shard
from speechfuse.texts.conversations import Conversation, row_of
from speechfuse.texts.curation.step import Dropped

Specs = list[dict[str, Any]]


def is_global(step: Any) -> bool:
    """Return whether `step` is a global one, which decides when it has seen all rows."""
    return hasattr(step, "decide")


def after_steps(
    planned: dict[str, Any], texts: Specs, steps: Specs
) -> Iterator[Conversation | Reject]:
    """Yield each row of a shard as `steps` leave it, or a Reject with the reason. Local steps are
    applied; what global steps decided is read from the plan."""
    applied = [component(spec) for spec in steps]
    for item in component(texts[planned["texts"]]).conversations(planned):
        for number, step in enumerate(applied):
            if isinstance(item, Reject):
                break
            if is_global(step):
                reason = planned["dropped"].get(str(number), {}).get(item.id)
                result = Dropped(reason) if reason else item
            else:
                result = step(item)
            if isinstance(result, Dropped):
                result = Reject(item.id, f"{FILTERED}{step.name} {result.reason}")
            item = result
        yield item


def curate_shard(planned: dict[str, Any], texts: Specs, steps: Specs) -> Shard:
    """Return the shard that `planned` describes: rows that pass `steps`, and rejects."""
    shard = Shard([], [], Counter())
    for item in after_steps(planned, texts, steps):
        if isinstance(item, Reject):
            shard.rejects.append({"id": item.id, "reason": item.reason})
        else:
            shard.rows.append(row_of(item))
    return shard


def sketches_of(planned: dict[str, Any], texts: Specs, steps: Specs) -> list[tuple[str, Any]]:
    """Return (id, sketch) of each row that reaches the last of `steps`, a global one."""
    step = component(steps[-1])
    rows = after_steps(planned, texts, steps[:-1])
    return [(item.id, step.sketch(item)) for item in rows if isinstance(item, Conversation)]
