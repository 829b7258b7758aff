"""The plan of a spoken dataset: which text becomes a sample of which kind, in whose voice.

In: the kinds of a recipe with their shares, finished artifacts of text, voices with their shares, a
seed. Out: shards of samples {id, kind, text, at, speech}, in the order of the texts, so that a
shard reads few of their files. Every share is exact to one sample, and the same configuration
plans the same. `at`: (shard, row) of the text; `speech`: {voice, seed} of each segment that is to
be made, in order. All the rest of a sample follows from its id and the recipe.
"""

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import config
from speechfuse.rows import shards
from speechfuse.rows.selection import matches
from speechfuse.synthesis.kinds import Kind, Turns
from speechfuse.texts.conversations import Conversation, conversation_of

Plan = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A kind of the recipe: its share of all samples, its texts, and which of them by `extra`."""

    name: str
    make: Kind
    share: float
    texts: Path
    select: dict[str, Any]

    def usable(self, conversation: Conversation) -> bool:
        row = {"id": conversation.id, **conversation.extra, "source": conversation.source}
        return matches(row, self.select) and self.turns(conversation, "") is not None

    def turns(self, conversation: Conversation, key: str) -> Turns | None:
        """The sample whose random numbers `key` gives."""
        return self.make(conversation, random.Random(key))


def entries(kinds: dict[str, dict[str, Any]], texts: str | None) -> dict[str, Entry]:
    """The kinds of a recipe, {name: {_component_, share, texts, select, ...}}. ValueError for one
    that is unknown or has no texts, and for shares that do not sum to 1."""
    shares = {name: spec.get("share") for name, spec in kinds.items()}
    fine = all(isinstance(s, int | float) and s > 0 for s in shares.values())
    if not kinds or not fine or abs(sum(s for s in shares.values() if s) - 1) > 1e-6:
        total = f", {sum(s for s in shares.values() if s):g} together" if fine else ""
        raise ValueError(
            f"kinds: the shares are {shares}{total}: give each kind a share above 0, together 1"
        )
    found = {}
    for name, spec in kinds.items():
        rest = {k: v for k, v in spec.items() if k not in ("share", "texts", "select")}
        folder = spec.get("texts", texts)
        if folder is None:
            raise ValueError(f"kinds.{name} has no texts: set texts=FOLDER for it or for all kinds")
        if not isinstance(folder, str) or not isinstance(spec.get("select") or {}, dict):
            raise ValueError(
                f"kinds.{name}: texts={folder!r} and select={spec.get('select')!r}: give the path "
                "of a folder, and a mapping of keys to values"
            )
        if "/" in name:
            raise ValueError(f"kinds.{name}: a name without a slash is needed")
        found[name] = Entry(
            name,
            config.instantiate(rest),
            float(spec["share"]),
            Path(folder),
            spec.get("select") or {},
        )
    return found


def conversations(folder: Path) -> Iterator[tuple[tuple[int, int], Conversation]]:
    """(shard, row) and conversation of every row of a finished artifact of text. ValueError for a
    row that holds speech, and for an artifact without conversations or without rows."""
    empty = True
    for number, path in enumerate(shards.shard_paths(folder)):
        if "turns" not in pq.read_schema(path).names:
            raise ValueError(
                f"{folder} holds rows of speech, not conversations: curate texts first"
            )
        for place, row in enumerate(shards.read_shard(path)):
            empty = False
            yield (number, place), conversation_of(row)
    if empty:
        raise ValueError(f"{folder} is empty: it holds no conversation")


def plan(
    kinds: dict[str, Entry], total: int | None, speakers: dict[str, float], seed: int, size: int
) -> Plan:
    """Shards of `size` samples, `total` in all; None: as many as the texts give without using one
    of them twice for the same kind. ValueError when a kind finds no text that it can use."""
    folders = sorted({kind.texts for kind in kinds.values()})
    usable: dict[str, list[tuple[int, int]]] = {name: [] for name in kinds}
    for folder in folders:
        mine = [kind for kind in kinds.values() if kind.texts == folder]
        for place, conversation in tqdm(conversations(folder), f"{folder.name}: texts", delay=2):
            for kind in mine:
                if kind.usable(conversation):
                    usable[kind.name].append(place)
    for name, places in usable.items():
        if not places:
            kind = kinds[name]
            raise ValueError(
                f"kinds.{name}: none of the texts in {kind.texts} can be used"
                + (f", select={kind.select}" if kind.select else "")
                + "; it needs other texts, or leave the kind out"
            )
    if total is None:
        total = min(int(len(usable[n]) / kind.share + 1e-9) for n, kind in kinds.items())
    wanted = counts(total, {name: kind.share for name, kind in kinds.items()})
    uses = {name: _uses(usable[name], wanted[name], f"{seed}/{name}") for name in kinds}
    samples = [
        sample
        for folder in folders
        for sample in _samples([k for k in kinds.values() if k.texts == folder], uses, seed)
    ]
    _give_voices(samples, speakers, seed)
    return [
        {"count": len(part), "samples": part}
        for start in range(0, len(samples), size)
        for part in [samples[start : start + size]]
    ]


def _uses(places: list[tuple[int, int]], wanted: int, key: str) -> dict[tuple[int, int], int]:
    """How often each text is used: all alike, to within one."""
    rounds, rest = divmod(wanted, len(places))
    more = set(random.Random(key).sample(places, rest))
    found = {place: rounds + (place in more) for place in places}
    return {place: times for place, times in found.items() if times}


def _samples(
    kinds: list[Entry], uses: dict[str, dict[tuple[int, int], int]], seed: int
) -> Iterator[dict[str, Any]]:
    chosen = {place for kind in kinds for place in uses[kind.name]}
    for place, conversation in tqdm(conversations(kinds[0].texts), "samples", delay=2):
        if place not in chosen:
            continue
        for kind in kinds:
            for use in range(uses[kind.name].get(place, 0)):
                id = f"{kind.name}/{conversation.id}" + (f"#{use}" if use else "")
                turns = kind.turns(conversation, f"{seed}/{id}")
                # one for all segments: the user keeps pace and pitch, room and noise
                same = random.Random(f"{seed}/{id}/speech").getrandbits(32)
                yield {
                    "id": id,
                    "kind": kind.name,
                    "text": conversation.id,
                    "at": list(place),
                    "speech": [
                        {"voice": None if "sound" in segment else "", "seed": same}
                        for segment in to_make(turns or [])
                    ],
                }


def to_make(turns: Turns) -> list[dict[str, Any]]:
    """The segments that are not text yet, in order."""
    return [s for turn in turns for s in turn["segments"] if "say" in s or "sound" in s]


def _give_voices(samples: list[dict[str, Any]], speakers: dict[str, float], seed: int) -> None:
    """One voice for all that is said in a sample: a conversation has one user."""
    said = [s for s in samples if any(part["voice"] is not None for part in s["speech"])]
    if not said:
        return
    names = assign([sample["kind"] for sample in said], speakers, seed)
    for sample, name in zip(said, names, strict=True):
        for part in sample["speech"]:
            if part["voice"] is not None:
                part["voice"] = name


def with_texts(
    part: list[dict[str, Any]], kinds: dict[str, Entry]
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """The samples of a shard with their texts, one file of texts in memory at a time. ValueError
    when a text is not what was planned with."""
    paths = {kind.texts: shards.shard_paths(kind.texts) for kind in kinds.values()}
    held, rows = None, list[dict[str, Any]]()
    for sample in part:
        number, place = sample["at"]
        path = paths[kinds[sample["kind"]].texts][number]
        if path != held:
            held, rows = path, list(shards.read_shard(path))
        if rows[place]["id"] != sample["text"]:
            raise ValueError(
                f"{path}: row {place} is {rows[place]['id']}, the plan was made with "
                f"{sample['text']}: these are other texts; start anew with fresh=true"
            )
        yield sample, conversation_of(rows[place])


Name = TypeVar("Name", bound=Hashable)


def counts(total: int, shares: Mapping[Name, float]) -> dict[Name, int]:
    """How many of `total` each voice gets: its share, rounded so that all together are `total`
    (largest remainders; of equal ones the first). ValueError unless shares are positive and sum to
    1."""
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)}: give at least one, each above 0, together 1")
    exact = {voice: total * share for voice, share in shares.items()}
    found = {voice: int(each) for voice, each in exact.items()}
    rest = sorted(exact, key=lambda voice: found[voice] - exact[voice])
    for voice in rest[: total - sum(found.values())]:
        found[voice] += 1
    return found


def assign(kinds: Sequence[str], shares: Mapping[Name, float], seed: int) -> list[Name]:
    """A voice for each segment: over all segments each voice has exactly `counts`, and within every
    kind its share too, to within a few segments. Which text a voice gets is drawn by `seed`."""
    rng = random.Random(seed)
    # every voice at its own even spacing, so that any stretch of the sequence has all of them in
    # their shares; segments are laid along it kind by kind
    spaced = [
        ((i + phase) / count, rng.random(), voice)
        for voice, count in counts(len(kinds), shares).items()
        for phase in [rng.random()]
        for i in range(count)
    ]
    spaced.sort(key=lambda item: item[:2])
    order = sorted(range(len(kinds)), key=lambda i: (kinds[i], rng.random()))
    found = {segment: voice for segment, (*_, voice) in zip(order, spaced, strict=True)}
    return [found[i] for i in range(len(kinds))]
