"""Speech by espeak-ng, the embedded default: many voices, nothing to download, fast.

In: text. Out: a waveform. A voice is an accent and a variant of espeak-ng, `en-us+Annie`; speaking
rate and pitch are drawn by the seed, so that one voice speaks in many ways.
"""

import random
import threading
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from speechfuse.audio.espeak_ng import EspeakLibrary, EspeakVoice, VoiceGroup
from speechfuse.synthesis.engines import Engine, Spoken

# variants whose samples differ from process to process: a row could not be made again
UNSTEADY = ("Alicia", "f2", "f3", "f5", "sandro", "victor")
_ONE = threading.Lock()  # the library has one state, however many engines a recipe has


@dataclass(frozen=True)
class Espeak(VoiceGroup, Engine):
    """espeak-ng with a group of voices. `language` is the one that rows state."""

    language: str = "en"
    # a sentence as long would not fit any window, however fast it is said
    max_characters = 20_000

    def voices(self) -> list[str]:
        return self.names

    def check(self) -> None:
        """Raises ValueError for a voice that espeak-ng lacks or cannot repeat, and for one of
        another language than English without `language`."""
        for name in self.names:
            if name.partition("+")[2] in UNSTEADY:
                raise ValueError(
                    f"voice {name!r} of espeak-ng sounds different in every process; leave out the "
                    f"variants {', '.join(UNSTEADY)}"
                )
        with _ONE, EspeakLibrary() as library:
            for name in self.names:
                language = library.speak("a", EspeakVoice(name)).language
                if self.language == "en" != language:
                    raise ValueError(
                        f"voice {name!r} speaks {language}, and rows would state en: set language"
                    )

    def identity(self) -> dict[str, Any]:
        """The release of espeak-ng with its voices."""
        return {"engine": "espeak-ng", "espeakng-loader": version("espeakng-loader")}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        """Say `text`; `about` has the rate and the pitch that `seed` drew."""
        drawn = self.draw(random.Random(seed), voice)
        # a new library for each text: its state carries over from one utterance to the next
        with _ONE, EspeakLibrary() as library:
            try:
                spoken = library.speak(text, drawn)
            except ValueError as error:
                raise ValueError(f"no sound: {error}") from None
        return Spoken(spoken.waveform, about={"rate": drawn.rate, "pitch": drawn.pitch})
