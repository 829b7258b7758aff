"""Speech by espeak-ng, the embedded default: many voices, nothing to download, fast.

In: text. Out: a waveform. A voice is an accent and a variant of espeak-ng, `en-us+Annie`; speaking
rate and pitch are drawn by the seed, so that one voice is heard in many ways.
"""

import random
import threading
from importlib.metadata import version
from typing import Any, Self

from speechfuse.audio import espeak_ng
from speechfuse.audio.espeak_ng import voice_group
from speechfuse.synthesis.engines import Spoken

# variants whose samples differ from process to process: a row could not be made again
UNSTEADY = ("Alicia", "f2", "f3", "f5", "sandro", "victor")
_ONE = threading.Lock()  # the library has one state, however many engines a recipe has


class Espeak:
    """espeak-ng's `accents` x `variants`, or without accents full voice names; `rate` in words a
    minute and `pitch` (0 to 99) are ranges. `language` is what rows say it is."""

    # a sentence as long would not fit any window, however fast it is said
    max_characters = 20_000
    parallel = 1
    not_identity = ()
    codec = None

    def __init__(
        self,
        variants: list[str],
        accents: list[str] | None = None,
        rate: tuple[int, int] = (140, 215),
        pitch: tuple[int, int] = (25, 75),
        language: str = "en",
    ) -> None:
        self.group = voice_group(variants, accents, rate, pitch)
        self.language = language

    def voices(self) -> list[str]:
        return self.group.names

    def check(self) -> None:
        """ValueError for a voice that espeak-ng has not, or does not say twice the same."""
        for name in self.voices():
            if name.partition("+")[2] in UNSTEADY:
                raise ValueError(
                    f"voice {name!r} of espeak-ng sounds different in every process; leave out the "
                    f"variants {', '.join(UNSTEADY)}"
                )
        with _ONE, espeak_ng.EspeakLibrary() as engine:
            for name in self.voices():
                engine.speak("a", espeak_ng.EspeakVoice(name))

    def identity(self) -> dict[str, Any]:
        """The release of espeak-ng with its voices."""
        return {"engine": "espeak-ng", "espeakng-loader": version("espeakng-loader")}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        """Say `text`; `about` has the rate and the pitch that `seed` drew."""
        rng = random.Random(seed)
        rate, pitch = rng.randint(*self.group.rate), rng.randint(*self.group.pitch)
        # a new one for each text: its state carries over from one utterance to the next
        with _ONE, espeak_ng.EspeakLibrary() as engine:
            try:
                spoken = engine.speak(text, espeak_ng.EspeakVoice(voice, rate, pitch))
            except ValueError as error:
                raise ValueError(f"no sound: {error}") from None
        return Spoken(spoken.waveform, about={"rate": rate, "pitch": pitch})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
