"""Where in a clip the phonemes of its text are.

In: how probable each phoneme is in each stretch of a clip, and the phonemes of its text in order.
Out: the phoneme of each stretch, along the most probable path (Viterbi's forced alignment).
"""

import numpy as np

from speechfuse.audio.espeak_ng import EspeakLibrary, EspeakVoice, NoSound
from speechfuse.quantizer.training.batches import phoneme_name


def spelled(engine: EspeakLibrary, text: str, voice: str, classes: dict[str, int]) -> list[int]:
    """The phonemes of `text` in espeak-ng's `voice`, as classes: a phoneme that is no class is left
    out, of equals in a row one is kept. Empty for a text without sound."""
    try:
        spoken = engine.speak(text, EspeakVoice(voice)).phonemes
    except NoSound:
        return []
    found = [classes[name] for _, each in spoken if (name := phoneme_name(each)) in classes]
    return [each for i, each in enumerate(found) if not i or each != found[i - 1]]


def aligned(probabilities: np.ndarray, phonemes: list[int], silence: int) -> np.ndarray:
    """The phoneme of each stretch, int64 (stretches,). `probabilities` is (stretches, classes).
    Each of `phonemes` has a stretch at least, but silences, which may be left out and may stand at
    both ends. Without phonemes, or where these are more than the stretches, the likeliest class of
    each."""
    if not phonemes:
        return probabilities.argmax(-1)
    path = [silence, *phonemes, silence]
    path = [each for i, each in enumerate(path) if not i or each != path[i - 1]]
    score = np.log(np.maximum(probabilities.astype(np.float32), 1e-7))[:, path]
    count, states = score.shape
    # a silence that is left out is stepped over: from the state before it to the one behind
    over = np.array([False, False, *(each == silence for each in path[1:-1])])[:states]
    best = np.full(states, -np.inf, np.float32)
    best[:2] = score[0, :2]
    steps = np.zeros((count, states), np.int8)
    for i in range(1, count):
        came = np.full((3, states), -np.inf, np.float32)  # from 0, 1 or 2 states before
        came[0], came[1, 1:] = best, best[:-1]
        came[2, over] = best[:-2][over[2:]]
        steps[i] = came.argmax(0)
        best = came.max(0) + score[i]
    state = states - 1 - int(states > 1 and best[-2] > best[-1])
    if best[state] == -np.inf:
        return probabilities.argmax(-1)
    found = np.empty(count, np.int64)
    for i in reversed(range(count)):
        found[i] = path[state]
        state -= int(steps[i, state])
    return found
