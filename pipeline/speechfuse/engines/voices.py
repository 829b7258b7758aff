"""Who speaks what: speaker diversity by plan.

In: the kind of every speech segment of a dataset, in order, and the voices with their shares. Out:
one voice for every segment. Made once, for the whole dataset, before anything is spoken.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Voice = TypeVar("Voice", bound=Hashable)


def counts(total: int, shares: Mapping[Voice, float]) -> dict[Voice, int]:
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


def assign(kinds: Sequence[str], shares: Mapping[Voice, float], seed: int) -> list[Voice]:
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
