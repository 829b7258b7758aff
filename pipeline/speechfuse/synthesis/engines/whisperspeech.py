"""Speech by WhisperSpeech, which runs in an environment of its own (`just setup-whisperspeech`).

In: text. Out: `TextToCodes` gives codes straight from the text, without audio and without a choice
of speaker; `TextToWaveform` gives a waveform in a speaker's voice, which the quantizer then
encodes. The model files are the published ones (WhisperSpeech/WhisperSpeech and
charactr/vocos-encodec-24khz on the Hub) and are read from this disk; their sha256 are part of the
dataset's identity.

A text-to-codes model makes the codes of the quantizer that it was trained with. Its file holds that
quantizer's codebook, which `check` compares with the codebook of the quantizer in use. A text
longer than the model's window is rejected. A process that gives no answer in time (see SILENCE) is
killed, which ends the job.
"""

import base64
import json
import os
import random
import signal
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Timer
from time import monotonic
from typing import Any, Self

import numpy as np
import torch

from speechfuse import workers
from speechfuse.artifact import sha256_of
from speechfuse.audio import decoding
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.checkpoints import read_torch
from speechfuse.quantizer.model import Quantizer
from speechfuse.synthesis.engines import Engine, Spoken

PYTHON = ".venv-whisperspeech/bin/python"
CODEBOOK = "embeddings.embedding.main.weight"
SPEAKER_WIDTH = 192
SILENCE = 900.0  # seconds that the process may take for its models, on one CPU thread
PER_CHARACTER = 1.0  # seconds more that it may take for each character of a text
ENDS = 30.0  # seconds that the process may take to end once its stdin is closed
MARGIN = 0.9  # share of the window that is used: a text may be spoken slower than asked for


@dataclass(kw_only=True, eq=False)
class _WhisperSpeech(Engine):
    """The process and its text-to-codes model.

    `t2s` is the model's file. `cps` is a range of paces in characters a second, of which each seed
    draws one. `temperature` is that of sampling, `dtype` that of the models' weights. `python` is
    the interpreter of WhisperSpeech's own environment.
    """

    t2s: str
    cps: tuple[float, float] = (13.0, 17.0)
    temperature: float = 0.7
    language: str = "en"
    dtype: str = "float32"
    python: str = PYTHON
    _process: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.cps[0] <= self.cps[1] or self.temperature < 0:
            raise ValueError(
                f"cps={self.cps}, temperature={self.temperature}: give [least, most] and 0 or up"
            )
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: choose float32, float16 or bfloat16")

    @property
    def files(self) -> dict[str, str]:
        """Return {argument: path} of the model files and folders that are set."""
        names = ("t2s", "s2a", "vocoder", "speakers")
        return {name: path for name in names if (path := getattr(self, name, None))}

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return read_torch(Path(self.t2s), {"config", "tunables", "state_dict"}, "t2s model")

    @cached_property
    def max_characters(self) -> int:  # type: ignore[override]
        """Return the most bytes (UTF-8) that a text may have: the number that the model reads or
        that it can say in its window at the slowest pace, whichever is less."""
        shape = self._spec["config"]
        seconds = shape["stoks_len"] / decoding.TOKEN_RATE
        return min(shape["ttoks_len"] - 1, int(MARGIN * seconds * self.cps[0]))

    def check(self) -> None:
        """Raises ValueError when the environment or a model file is missing, and when `t2s` is no
        text-to-codes model."""
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
        paths = {key: Path(path) for key, path in self.files.items()}
        hashes = {
            f"{key}/{file.name}": sha256_of(file)
            for key, path in paths.items()
            for file in ([path] if path.is_file() else sorted(path.iterdir()))
        }
        return {"engine": "whisperspeech", "files": hashes}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the process's answer; whisperspeech_worker.py describes both.
        Raises ValueError for a text that the process rejects, and Unavailable when the process
        fails, has ended or gives no answer in time."""
        assert self._process, "use it in a with"
        # kills the whole process group: `python` may be a script that starts another process
        limit = SILENCE + PER_CHARACTER * len(request.get("text", ""))
        timer, start = Timer(limit, os.killpg, (self._process.pid, signal.SIGKILL)), monotonic()
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            if monotonic() - start >= limit:
                raise Unavailable(
                    f"WhisperSpeech said nothing for {limit:g} s and was ended: see that the "
                    f"device ({workers.device()}) is free; finished shards are kept"
                )
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Unavailable(f"WhisperSpeech's process has ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"WhisperSpeech failed: {answer['error']}")
        if "reject" in answer:
            raise ValueError(answer["reject"])
        return answer

    def _speak(
        self, text: str, seed: int, speaker: list[float] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (the process's answer, {"cps": the pace that `seed` drew})."""
        about = {"cps": round(random.Random(seed).uniform(*self.cps), 2)}
        request = {"text": " ".join(text.split()), "seed": seed, "speaker": speaker, **about}
        options = {"language": self.language, "temperature": self.temperature}
        return self._ask(request | options), about

    def __enter__(self) -> Self:
        script = str(resources.files("speechfuse.synthesis.engines") / "whisperspeech_worker.py")
        # no PYTHONPATH, as it has packages of its own; offline, as all its files are on this disk
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile("w+")
        pipes: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": self._errors}
        self._process = Popen(
            [self.python, "-P", script], **pipes, text=True, env=environment, start_new_session=True
        )
        models = {name: self.files.get(name) for name in ("t2s", "s2a", "vocoder")}
        try:
            self._ask(models | {"dtype": self.dtype, "device": workers.device()})
        except ValueError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
            try:
                self._process.wait(ENDS)
            except TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process.stdout.close()
            self._errors.close()
        self._process = None


@dataclass(kw_only=True, eq=False)
class TextToCodes(_WhisperSpeech):
    """An engine that makes codes of `quantizer` straight from text, by `t2s`.

    `whisper` is the quantizer's openai-whisper .pt, needed where `quantizer` is a published .model
    file, and `window` the seconds that its encoder is cut to. The speaker cannot be chosen; only
    the pace varies.
    """

    quantizer: str
    whisper: str | None = None
    window: float | None = None

    @cached_property
    def _quantizer(self) -> Quantizer:
        return Quantizer.load(self.quantizer, self.whisper, self.window)

    @cached_property
    def codec(self) -> str:  # type: ignore[override]
        return self._quantizer.identity

    def voices(self) -> list[str]:
        return ["whisperspeech"]

    def check(self) -> None:
        """Raises ValueError as the base class does, and when the codebook in `t2s` is not that of
        `quantizer`."""
        super().check()
        size, rows = self._quantizer.codebook_size, self._spec["config"]["stoks_codes"]
        own = self._spec["state_dict"].get(CODEBOOK)
        expected = self._quantizer.codebook[:size]
        alike = own is not None and own.shape[1] == expected.shape[1] and rows == size + 1
        if not alike or not torch.allclose(own[:size].float(), expected, atol=1e-3):
            shape = "none" if own is None else f"{rows - 1} codes of {own.shape[1]}"
            raise ValueError(
                f"t2s={self.t2s} speaks the codes of another codec than {self.quantizer}: its "
                f"codebook ({shape}) is not the quantizer's ({size} codes of {expected.shape[1]}); "
                "take the model that was trained with this codec, or the route over a waveform "
                "(TextToWaveform)"
            )

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        answer, about = self._speak(text, seed)
        return Spoken(codes=np.array(answer["codes"], np.uint16), about=about)


@dataclass(kw_only=True, eq=False)
class TextToWaveform(_WhisperSpeech):
    """An engine that makes waveforms: text to codes by `t2s`, codes to acoustic codes by `s2a`,
    acoustic codes to samples by `vocoder` (a folder).

    `speakers` is a JSON file {name: 192 numbers}, which whisperspeech_speakers.py makes from
    recordings; with None the only voice is WhisperSpeech's default speaker.
    """

    s2a: str
    vocoder: str
    speakers: str | None = None

    @cached_property
    def _embeddings(self) -> dict[str, list[float] | None]:
        if not self.speakers:
            return {"default": None}
        with suppress(OSError, ValueError, AttributeError, TypeError):
            embeddings = json.loads(Path(self.speakers).read_text())
            if embeddings and all(len(e) == SPEAKER_WIDTH for e in embeddings.values()):
                return embeddings
        raise ValueError(
            f"speakers={self.speakers}: give a JSON file {{name: [{SPEAKER_WIDTH} numbers]}}"
        )

    def voices(self) -> list[str]:
        return list(self._embeddings)

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        answer, about = self._speak(text, seed, self._embeddings[voice])
        samples = np.frombuffer(base64.b64decode(answer["samples"]), np.float32)
        return Spoken(decoding.resample(samples, answer["rate"]), about=about)
