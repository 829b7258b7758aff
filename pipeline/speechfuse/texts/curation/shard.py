"""One shard of curated text: rows of a source in, what the steps leave of them out. What
stages.curate_texts runs in its workers.

In: a shard of the plan, {texts: number of its source, dropped: {number of a global step: {id:
why}}, ...}, and the {_component_, ...} of sources and steps. Out: rows of shards.CONVERSATIONS, and
a reject for every other row.
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
    """Whether a step has to see all rows, see curation.step."""
    return hasattr(step, "decide")


def after_steps(
    planned: dict[str, Any], texts: Specs, steps: Specs
) -> Iterator[Conversation | Reject]:
    """Each row of a shard after `steps`; of global ones, what the plan says they decided."""
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
    """The shard `planned`, in a worker process."""
    shard = Shard([], [], Counter())
    for item in after_steps(planned, texts, steps):
        if isinstance(item, Reject):
            shard.rejects.append({"id": item.id, "reason": item.reason})
        else:
            shard.rows.append(row_of(item))
    return shard


def sketches_of(planned: dict[str, Any], texts: Specs, steps: Specs) -> list[tuple[str, Any]]:
    """(id, sketch) by the last of `steps`, a global one, of each row that reaches it."""
    step = component(steps[-1])
    rows = after_steps(planned, texts, steps[:-1])
    return [(item.id, step.sketch(item)) for item in rows if isinstance(item, Conversation)]
