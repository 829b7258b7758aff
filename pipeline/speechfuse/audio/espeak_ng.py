"""Text to waveform: offline synthesis with espeak-ng, and with the voices of flite and festival
where these are installed.

In: one line of text and a voice. Out: a mono float32 waveform at 16 kHz (and, from espeak-ng, where
each phoneme starts). espeak-ng comes as a shared library with its voices inside the wheel
`espeakng-loader`; it is called through ctypes because one process per utterance costs more than the
synthesis itself.
"""

import _ctypes
import ctypes
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import espeakng_loader
import numpy as np

from speechfuse.audio import decoding

# espeak_EVENT_TYPE and espeak_PARAMETER of speak_lib.h
PHONEME, RATE_PARAMETER, PITCH_PARAMETER = 7, 1, 3
SYNCHRONOUS, PHONEME_EVENTS, CHARS_UTF8 = 2, 1, 1


class _Event(ctypes.Structure):
    _numbers = ("type", "unique_identifier", "text_position", "length", "audio_position", "sample")
    _fields_ = (
        *((name, ctypes.c_int) for name in _numbers),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


class _Voice(ctypes.Structure):  # the first of the fields of espeak_VOICE
    _fields_ = (("name", ctypes.c_char_p), ("languages", ctypes.c_char_p))


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class EspeakVoice:
    """One way of speaking: espeak-ng `name` (language+variant, as `en-us+Annie`), `flite:slt` or
    `festival:kal_diphone`; `rate` in words per minute (80-450, 170 is neutral), `pitch` 0-99
    (espeak-ng's own scale, 50 is neutral; the recording of another program is played faster or
    slower by up to 2 ** 0.5, which moves the voice as a whole)."""

    name: str
    rate: int = 170
    pitch: int = 50


@cache
def _variants() -> list[str]:
    return os.listdir(Path(espeakng_loader.get_data_path()) / "voices" / "!v")


class NoSound(ValueError):
    """Says of a text that it cannot be spoken."""


@dataclass(frozen=True)
class Utterance:
    """`waveform`: float32, 16 kHz, mono. `phonemes`: (start second, espeak-ng phoneme name) in
    order. `language`: of the voice, as en."""

    waveform: np.ndarray
    phonemes: list[tuple[float, str]]
    language: str = "en"


class EspeakLibrary:
    """One espeak-ng, to be used in a `with` block.

    Its state (pitch flutter, noise) carries over from one utterance to the next and survives
    espeak_Terminate, so leaving the block unloads the library: the same texts and voices in the
    same order give the same samples.
    """

    def __enter__(self) -> "EspeakLibrary":
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._lib.espeak_Initialize(SYNCHRONOUS, 0, data, PHONEME_EVENTS)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng could not read its voices in {data.decode()}")
        self._chunks: list[np.ndarray] = []
        self._phonemes: list[tuple[float, str]] = []
        self._callback = _CALLBACK(self._receive)  # kept: espeak-ng holds only a raw pointer to it
        self._lib.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.espeak_Terminate()
        _ctypes.dlclose(self._lib._handle)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != 0:
            if events[i].type == PHONEME:
                name = events[i].name.decode("utf-8", "replace")
                self._phonemes.append((events[i].sample / self.sample_rate, name))
            i += 1
        return 0

    def choose(self, voice: EspeakVoice) -> None:
        """Speak in `voice` from here on. Raises ValueError for an unknown one."""
        _, _, variant = voice.name.partition("+")
        # espeak-ng speaks an unknown variant in the plain voice of the language, without a word
        exists = variant in {"", *_variants()}
        if not exists or self._lib.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}; write it as en-us+Annie")
        self._lib.espeak_SetParameter(RATE_PARAMETER, voice.rate, 0)
        self._lib.espeak_SetParameter(PITCH_PARAMETER, voice.pitch, 0)

    def speak(self, text: str, voice: EspeakVoice) -> Utterance:
        """Synthesize `text`. Raises ValueError for an unknown voice, NoSound for a text without
        sound."""
        if "\0" in text:
            raise NoSound(f"the text {text!r:.60} holds U+0000, at which espeak-ng would stop")
        self.choose(voice)
        self._chunks, self._phonemes = [], []
        # breathy variants draw noise from the C library's rand(), which others here also call
        ctypes.CDLL(None).srand(1)
        raw = text.encode()
        self._lib.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, CHARS_UTF8, None, None)
        if not any(chunk.any() for chunk in self._chunks):
            raise NoSound(f"espeak-ng made no sound for the text {text!r}")
        pcm = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        self._lib.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
        languages = self._lib.espeak_GetCurrentVoice().contents.languages  # a byte, then "en-us"
        language = languages[1:].decode().partition("-")[0]
        return Utterance(decoding.resample(pcm, self.sample_rate), self._phonemes, language)


@cache
def _flite_voices() -> list[str]:
    listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True)
    return listed.stdout.partition(":")[2].split()


def speak(engine: EspeakLibrary, text: str, voice: EspeakVoice) -> Utterance:
    """`text` in `voice`. A voice named flite:slt (rms, awb, kal16) or festival:kal_diphone is
    spoken by that program, which gives no phonemes. Raises ValueError for a voice that is not
    installed, NoSound for a text without sound."""
    program, _, name = voice.name.partition(":")
    if program not in ("flite", "festival"):
        return engine.speak(text, voice)
    if not shutil.which(program):
        raise ValueError(f"the voice {voice.name} needs {program}, which is not installed here")
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        if program == "flite":
            if name not in _flite_voices():  # it would speak in its first voice, without a word
                raise ValueError(f"flite has no voice {name!r}; it has {_flite_voices()}")
            longer = ["--setf", f"duration_stretch={170 / voice.rate}"]
            subprocess.run([program, "-voice", name, *longer, "-t", text, "-o", wav], check=True)
        else:
            _run_festival(text, name, 170 / voice.rate, wav)
        try:
            played = round(decoding.SAMPLE_RATE * 2 ** ((voice.pitch - 50) / 100))
            return Utterance(decoding.resample(decoding.load(wav), played), [])
        except (ValueError, FileNotFoundError) as error:
            raise NoSound(f"{program} made no sound for the text {text!r}: {error}") from None


def _run_festival(text: str, name: str, longer: float, wav: Path) -> None:
    """Write `wav`, `longer` times as long as the voice would speak, or nothing for a text without
    sound. A process of its own for each text, as it starts in 0.2 s and ends by a segmentation
    fault at a text without words."""
    said = text.replace("\\", "\\\\").replace('"', '\\"')  # in a string of Scheme
    call = f'(utt.save.wave (utt.synth (Utterance Text "{said}")) "{wav}" \'riff)'
    call = f"(voice_{name}) (Parameter.set 'Duration_Stretch {longer}) {call}"
    script = f"(if (symbol-bound? 'voice_{name}) (begin {call}) (exit 3))"
    command = ["festival", "--pipe"]
    if not name.isidentifier() or (
        subprocess.run(command, input=script.encode(), capture_output=True).returncode == 3
    ):
        raise ValueError(f"festival has no voice {name!r}; one is named as festival:kal_diphone")


@dataclass(frozen=True)
class VoiceGroup:
    """Voices to draw from: espeak-ng's `accents` x `variants`, or without accents full voice names
    (also of flite and festival); `rate` in words a minute and `pitch` (0 to 99) are ranges."""

    variants: list[str]
    accents: list[str] | None = None
    rate: tuple[int, int] = (140, 215)
    pitch: tuple[int, int] = (25, 75)

    def __post_init__(self) -> None:
        if not self.variants or self.accents == []:
            raise ValueError(
                f"voices: variants={self.variants}, accents={self.accents}: give at least one of "
                "each, or accents=null for full names of voices"
            )
        for name in ("rate", "pitch"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"voices: {name}={[low, high]}: give [least, most]")

    @property
    def names(self) -> list[str]:
        return [
            f"{accent}+{variant}" if accent else variant
            for accent in self.accents or [""]
            for variant in self.variants
        ]

    def draw(self, rng: random.Random, name: str | None = None) -> EspeakVoice:
        """The voice `name`, by default one of the group, with a rate and a pitch."""
        name = name or rng.choice(self.names)
        return EspeakVoice(name, rng.randint(*self.rate), rng.randint(*self.pitch))
