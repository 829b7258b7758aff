"""Speech by WhisperSpeech, which runs in an environment of its own (`just setup-whisperspeech`).

In: text. Out: by `TextToCodes` semantic codes straight from the text, without audio and without a
speaker; by `TextToWaveform` a waveform in a speaker's voice, for the quantizer to encode. Model
files are the published ones, on this disk (WhisperSpeech/WhisperSpeech and
charactr/vocos-encodec-24khz on the Hub); their sha256 are part of what is made.

A text-to-codes model speaks the codes of the codec that it was trained with, and carries that
codec's codebook inside: it is compared with the quantizer's. Text over a model's window is refused.
A process that is silent for long is ended, and the job with it.
"""

import base64
import json
import os
import random
import subprocess
import tempfile
from contextlib import suppress
from functools import cached_property
from importlib import resources
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any, Self

import numpy as np
import torch

from speechfuse import workers
from speechfuse.artifact import sha256_of
from speechfuse.audio import decoding
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.model import Quantizer, read_torch
from speechfuse.synthesis.engines import Spoken

PYTHON = ".venv-whisperspeech/bin/python"
CODEBOOK = "embeddings.embedding.main.weight"
SPEAKER_WIDTH = 192
# seconds of silence before it is taken to hang: to read its models, and for a text; a character is
# a fifteenth of a second of speech
STARTS, SPEAKS, CHARACTER, ENDS = 900.0, 120.0, 5.0, 30.0
MARGIN = 0.9  # of the window: not every text keeps to the pace that it is asked for


class _WhisperSpeech:
    """What both routes share: the process, the text-to-codes model and its window."""

    parallel = 1
    not_identity = ()
    files: dict[str, str]

    def __init__(
        self,
        t2s: str,
        cps: tuple[float, float],
        temperature: float,
        language: str,
        dtype: str,
        python: str,
    ) -> None:
        if not 0 < cps[0] <= cps[1] or temperature < 0:
            raise ValueError(
                f"cps={cps}, temperature={temperature}: give [least, most] and 0 or up"
            )
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: choose float32, float16 or bfloat16")
        self.t2s, self.cps, self.temperature = t2s, cps, temperature
        self.language, self.dtype, self.python = language, dtype, python
        self.files = {"t2s": t2s}
        self._process: subprocess.Popen[str] | None = None

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return read_torch(Path(self.t2s), {"config", "tunables", "state_dict"}, "t2s model")

    @cached_property
    def max_characters(self) -> int:
        """Bytes of text that the model reads, or can say in its window at the slowest pace."""
        shape = self._spec["config"]
        seconds = shape["stoks_len"] / decoding.TOKEN_RATE
        return min(shape["ttoks_len"] - 1, int(MARGIN * seconds * self.cps[0]))

    def check(self) -> None:
        """ValueError without the environment or a file."""
        if not Path(self.python).exists():
            raise ValueError(
                f"python={self.python} is not there: run `just setup-whisperspeech`, which makes "
                "WhisperSpeech's own environment"
            )
        for key, path in self.files.items():
            if not Path(path).exists():
                raise ValueError(
                    f"{key}={path} is not there: get it from WhisperSpeech/WhisperSpeech on the "
                    "Hub (the vocoder's folder: charactr/vocos-encodec-24khz)"
                )
        if not {"ttoks_len", "stoks_len", "stoks_codes"} <= set(self._spec["config"]):
            raise ValueError(f"t2s={self.t2s} is no text-to-codes model of WhisperSpeech")

    def identity(self) -> dict[str, Any]:
        """The sha256 of every model file."""
        hashes: dict[str, str] = {}
        for key, path in self.files.items():
            inside = [Path(path)] if Path(path).is_file() else sorted(Path(path).iterdir())
            hashes |= {f"{key}/{file.name}": sha256_of(file) for file in inside}
        return {"engine": "whisperspeech", "files": hashes}

    def _settings(self) -> dict[str, Any]:
        return {
            "t2s": self.t2s,
            "s2a": None,
            "vocoder": None,
            "dtype": self.dtype,
            "device": workers.device(),
        }

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process and self._process.stdin, "use it in a with"
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except BrokenPipeError:
            line = ""
        except Empty:
            self._process.kill()
            raise Unavailable(
                f"WhisperSpeech said nothing for {seconds:g} s and was ended: see that the device "
                f"({workers.device()}) is free; finished shards are kept"
            ) from None
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Unavailable(f"WhisperSpeech's process has ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"WhisperSpeech failed: {answer['error']}")
        if "reject" in answer:
            raise ValueError(answer["reject"])
        return answer

    def _say(
        self, text: str, seed: int, speaker: list[float] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        cps = round(random.Random(seed).uniform(*self.cps), 2)
        request = {
            "text": " ".join(text.split()),
            "seed": seed,
            "cps": cps,
            "language": self.language,
            "temperature": self.temperature,
            "speaker": speaker,
        }
        return self._ask(request, SPEAKS + CHARACTER * len(text)), {"cps": cps}

    def __enter__(self) -> Self:
        script = str(resources.files("speechfuse.synthesis.engines") / "whisperspeech_worker.py")
        # its packages are its own, and all it needs lies on this disk
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [self.python, "-P", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            self._ask(self._settings(), STARTS)
        except ValueError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process and self._process.stdin:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
            try:
                self._process.wait(ENDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._errors.close()
        self._process = None


def _read(file: IO[str], lines: SimpleQueue[str]) -> None:
    """Lines as they come, and "" at the end; a pipe cannot be read with a time limit."""
    for line in file:
        lines.put(line)
    lines.put("")


class TextToCodes(_WhisperSpeech):
    """Text straight to codes by `t2s`, of the codec of `quantizer` (with `whisper` where that is a
    published .model). No speaker: what varies is the pace, `cps` characters a second."""

    def __init__(
        self,
        t2s: str,
        quantizer: str,
        whisper: str | None = None,
        cps: tuple[float, float] = (13.0, 17.0),
        temperature: float = 0.7,
        language: str = "en",
        dtype: str = "float32",
        python: str = PYTHON,
    ) -> None:
        super().__init__(t2s, cps, temperature, language, dtype, python)
        self.quantizer, self.whisper = Path(quantizer), Path(whisper) if whisper else None

    @cached_property
    def _quantizer(self) -> Quantizer:
        return Quantizer.load(self.quantizer, self.whisper)

    @cached_property
    def codec(self) -> str:
        return self._quantizer.identity

    def voices(self) -> list[str]:
        return ["whisperspeech"]

    def check(self) -> None:
        """Also ValueError when the model was trained with another codec than the quantizer."""
        super().check()
        codes, rows = self._quantizer.codebook_size, self._spec["config"]["stoks_codes"]
        own = self._spec["state_dict"].get(CODEBOOK)
        theirs = self._quantizer.codebook[:codes]
        if own is None or own.shape[1] != theirs.shape[1] or rows != codes + 1:
            shape = "none" if own is None else f"{rows - 1} codes of {own.shape[1]}"
            raise ValueError(
                f"t2s={self.t2s}: its codebook ({shape}) is not that of {self.quantizer} ({codes} "
                f"codes of {theirs.shape[1]}): take the model that was trained with this codec, or "
                "the route over a waveform (TextToWaveform)"
            )
        if not torch.allclose(own[:codes].float(), theirs, atol=1e-3):
            raise ValueError(
                f"t2s={self.t2s} speaks the codes of another codec than {self.quantizer}: a model "
                "trained on them would hear nothing; take the one that was trained with this "
                "codec, or the route over a waveform (TextToWaveform)"
            )

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        answer, about = self._say(text, seed, None)
        return Spoken(codes=np.array(answer["codes"], np.uint16), about=about)


class TextToWaveform(_WhisperSpeech):
    """Text to codes by `t2s`, to acoustic codes by `s2a`, to sound by `vocoder` (a folder).
    `speakers`: JSON {name: 192 numbers}, which whisperspeech_speakers.py makes of recordings; None
    for WhisperSpeech's own one."""

    codec = None

    def __init__(
        self,
        t2s: str,
        s2a: str,
        vocoder: str,
        speakers: str | None = None,
        cps: tuple[float, float] = (13.0, 17.0),
        temperature: float = 0.7,
        language: str = "en",
        dtype: str = "float32",
        python: str = PYTHON,
    ) -> None:
        super().__init__(t2s, cps, temperature, language, dtype, python)
        self.files |= {"s2a": s2a, "vocoder": vocoder} | (
            {"speakers": speakers} if speakers else {}
        )

    @cached_property
    def _speakers(self) -> dict[str, list[float] | None]:
        if "speakers" not in self.files:
            return {"default": None}
        path = Path(self.files["speakers"])
        try:
            found = json.loads(path.read_text())
            assert found and all(len(each) == SPEAKER_WIDTH for each in found.values())
        except (OSError, ValueError, AssertionError, AttributeError, TypeError):
            raise ValueError(
                f"speakers={path}: give a JSON file {{name: [{SPEAKER_WIDTH} numbers]}}"
            ) from None
        return found

    def voices(self) -> list[str]:
        return list(self._speakers)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {key: self.files[key] for key in ("s2a", "vocoder")}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        answer, about = self._say(text, seed, self._speakers[voice])
        samples = np.frombuffer(base64.b64decode(answer["samples"]), np.float32)
        return Spoken(decoding.resample(samples, answer["rate"]), about=about)
