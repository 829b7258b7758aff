"""The plan of a spoken dataset: which text becomes a sample of which kind, in whose voice.

In: the kinds of a recipe with their shares, finished artifacts of text, voices with their shares, a
seed. Out: shards {count, samples, examples}. A sample is {id, kind, text, at, speech}; samples are
in the order of the texts, so that a shard reads few of their files. Every share is exact to one
sample, and the same configuration gives the same plan. `at`: (shard, row) of the text; `speech`:
{voice, seed} of each segment with speech or sound, in order; `examples`: ids of samples whose audio
is kept. All the rest of a sample follows from its id and the recipe.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.rows import shards
from speechfuse.rows.selection import matches
from speechfuse.synthesis.kinds import Kind, Turns
from speechfuse.texts.conversations import Conversation, conversation_of

Plan = list[dict[str, Any]]
Place = tuple[int, int]  # of a text: (shard, row)

EXAMPLES = 3  # samples of each kind, at equal distances, whose audio is kept to be listened to


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
        """The turns of the sample whose random numbers `key` seeds; None where the kind cannot use
        the conversation."""
        return self.make(conversation, random.Random(key))


def check_shares(key: str, shares: Mapping[Any, Any]) -> None:
    """Raises ValueError, which names the configuration's `key`, unless there are shares, each above
    0, and they sum to 1."""
    numbers = all(isinstance(share, int | float) and share > 0 for share in shares.values())
    if not shares or not numbers or abs(sum(shares.values()) - 1) > 1e-6:
        total = f", {sum(shares.values()):g} together" if numbers else ""
        raise ValueError(
            f"{key}: the shares are {dict(shares)}{total}: give each one above 0, together 1"
        )


def entries_of(kinds: dict[str, dict[str, Any]], texts: str | None) -> dict[str, Entry]:
    """The kinds of a recipe, {name: {_component_, share, texts, select, ...}}. Raises ValueError
    for one that is unknown or has no texts, and for shares that do not sum to 1."""
    shares = {name: spec.get("share") for name, spec in kinds.items()}
    check_shares("kinds", shares)
    entries = {}
    for name, spec in kinds.items():
        arguments = {k: v for k, v in spec.items() if k not in ("share", "texts", "select")}
        folder, select = spec.get("texts", texts), spec.get("select") or {}
        if folder is None:
            raise ValueError(f"kinds.{name} has no texts: set texts=FOLDER for it or for all kinds")
        if not isinstance(folder, str) or not isinstance(select, dict):
            raise ValueError(
                f"kinds.{name}: texts={folder!r} and select={select!r}: give the path of a folder, "
                "and a mapping of keys to values"
            )
        if "/" in name:
            raise ValueError(f"kinds.{name}: a name without a slash is needed")
        kind = config.instantiate(arguments)
        entries[name] = Entry(name, kind, float(spec["share"]), Path(folder), select)
    return entries


def conversations(folder: Path) -> Iterator[tuple[Place, Conversation]]:
    """(shard, row) and conversation of every row of a finished artifact of text. Raises ValueError
    for rows of speech and for an artifact without rows."""
    empty = True
    for number, path in enumerate(shards.shard_paths(folder)):
        if "turns" not in pq.read_schema(path).names:
            raise ValueError(f"{folder} holds speech, not conversations: curate texts first")
        for place, row in enumerate(shards.read_shard(path)):
            empty = False
            yield (number, place), conversation_of(row)
    if empty:
        raise ValueError(f"{folder} is empty: it holds no conversation")


def plan(
    kinds: dict[str, Entry], total: int | None, speakers: dict[str, float], seed: int, size: int
) -> Plan:
    """Shards of `size` samples, `total` in all; None: as many as the texts give without using one
    of them twice for the same kind. Raises ValueError when a kind can use none of its texts."""
    kinds_of = defaultdict[Path, list[Entry]](list)  # folder of texts: the kinds that read it
    for kind in kinds.values():
        kinds_of[kind.texts].append(kind)
    usable = defaultdict[str, list[Place]](list)
    for folder in sorted(kinds_of):
        for place, conversation in tqdm(conversations(folder), f"{folder.name}: texts", delay=2):
            for kind in kinds_of[folder]:
                if kind.usable(conversation):
                    usable[kind.name].append(place)
    if useless := [kind for name, kind in kinds.items() if not usable[name]]:
        whose = {f"{kind.texts}, select={kind.select or None}": None for kind in useless}
        names = [f"kinds.{kind.name}" for kind in useless]
        raise ValueError(
            f"{', '.join(names)}: none of the texts can be used (of {'; of '.join(whose)}): other "
            f"texts are needed, or leave out what has none: {'=null '.join(names)}=null"
        )
    if total is None:
        total = min(int(len(usable[n]) / kind.share + 1e-9) for n, kind in kinds.items())
    many = counts(total, {name: kind.share for name, kind in kinds.items()})
    uses = {name: _uses(usable[name], many[name], f"{seed}/{name}") for name in kinds}
    samples = [s for folder in sorted(kinds_of) for s in _samples(kinds_of[folder], uses, seed)]
    _give_voices(samples, speakers, seed)
    ids = defaultdict[str, list[str]](list)
    for sample in samples:
        ids[sample["kind"]].append(sample["id"])
    examples = {id for each in ids.values() for id in artifact.take_evenly(each, EXAMPLES)}
    shard_list = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        with_audio = [sample["id"] for sample in part if sample["id"] in examples]
        shard_list.append({"count": len(part), "samples": part, "examples": with_audio})
    return shard_list


def _uses(places: list[Place], count: int, key: str) -> dict[Place, int]:
    """How often each text is used, `count` times in all: all alike, to within one."""
    rounds, rest = divmod(count, len(places))
    more = random.Random(key).sample(places, rest)
    return dict.fromkeys(places if rounds else [], rounds) | dict.fromkeys(more, rounds + 1)


def _samples(
    kinds: list[Entry], uses: dict[str, dict[Place, int]], seed: int
) -> Iterator[dict[str, Any]]:
    chosen, ids = {place for kind in kinds for place in uses[kind.name]}, set[str]()
    for place, conversation in tqdm(conversations(kinds[0].texts), "samples", delay=2):
        if place not in chosen:
            continue
        for kind in kinds:
            for use in range(uses[kind.name].get(place, 0)):
                id = f"{kind.name}/{conversation.id}" + (f"#{use}" if use else "")
                while id in ids:  # of a conversation whose own id ends in #1
                    id += "#"
                ids.add(id)
                segments = segments_to_speak(kind.turns(conversation, f"{seed}/{id}") or [])
                voices = [None if "sound" in segment else "" for segment in segments]
                # one for all segments: the user keeps pace and pitch, room and noise
                own_seed = random.Random(f"{seed}/{id}/speech").getrandbits(32)
                speech = [{"voice": voice, "seed": own_seed} for voice in voices]
                sample = {"id": id, "kind": kind.name, "text": conversation.id}
                yield sample | {"at": list(place), "speech": speech}


def segments_to_speak(turns: Turns) -> list[dict[str, Any]]:
    """The segments to be spoken or filled with sound, in order."""
    return [s for turn in turns for s in turn["segments"] if "say" in s or "sound" in s]


def _give_voices(samples: list[dict[str, Any]], speakers: dict[str, float], seed: int) -> None:
    """Fill in one voice for all speech of a sample: a conversation has one user."""
    speaking = [s for s in samples if any(part["voice"] is not None for part in s["speech"])]
    voices = assign([sample["kind"] for sample in speaking], speakers, seed)
    for sample, voice in zip(speaking, voices, strict=True):
        for part in sample["speech"]:
            part["voice"] = None if part["voice"] is None else voice


def with_texts(
    part: list[dict[str, Any]], kinds: dict[str, Entry]
) -> Iterator[tuple[dict[str, Any], Conversation]]:
    """The samples of a shard with their texts, one file of texts in memory at a time. Raises
    ValueError when a text is not the one that the plan was made with."""
    paths = {kind.texts: shards.shard_paths(kind.texts) for kind in kinds.values()}
    loaded, rows = None, list[dict[str, Any]]()
    for sample in part:
        number, place = sample["at"]
        path = paths[kinds[sample["kind"]].texts][number]
        if path != loaded:
            loaded, rows = path, list(shards.read_shard(path))
        if rows[place]["id"] != sample["text"]:
            raise ValueError(
                f"{path}: row {place} is {rows[place]['id']}, the plan was made with "
                f"{sample['text']}: these are other texts; start anew with fresh=true"
            )
        yield sample, conversation_of(rows[place])


Name = TypeVar("Name", bound=Hashable)


def counts(total: int, shares: Mapping[Name, float]) -> dict[Name, int]:
    """How many of `total` each voice gets: its share, rounded so that all together are `total`
    (largest remainders; of equal ones the first). Raises ValueError unless shares are positive and
    sum to 1."""
    check_shares("voices", shares)
    exact = {voice: total * share for voice, share in shares.items()}
    rounded = {voice: int(count) for voice, count in exact.items()}
    by_remainder = sorted(exact, key=lambda voice: rounded[voice] - exact[voice])
    for voice in by_remainder[: total - sum(rounded.values())]:
        rounded[voice] += 1
    return rounded


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
    voices = {segment: voice for segment, (*_, voice) in zip(order, spaced, strict=True)}
    return [voices[i] for i in range(len(kinds))]
