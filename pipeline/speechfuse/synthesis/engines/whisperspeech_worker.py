"""WhisperSpeech in its own environment; run by engines.whisperspeech, never imported.

    .venv-whisperspeech/bin/python -P whisperspeech_worker.py

In: lines of JSON on stdin, first the settings, then one text each. Out: one line of JSON for each
on stdout: {"ready": ...}, then {"codes": [...]}, {"samples": base64 of float32, "rate": 24000},
{"reject": "kind: detail"} or {"error": ...}. Inference is whisperspeech 0.8.9's own classes, as its
Pipeline calls them. The process ends when its stdin does.
"""

import base64
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from whisperspeech.pipeline import Pipeline, SADelARTransformer, TSARTransformer, Vocoder

PACKAGES = ("whisperspeech", "torch", "vocos", "encodec")
ACOUSTIC_CODES = 1024  # EnCodec's; those beyond are marks of the model


class Speaker:
    """Text to codes, and with an s2a model and a vocoder on to samples."""

    def __init__(
        self, t2s: str, s2a: str | None, vocoder: str | None, device: str, dtype: str
    ) -> None:
        self.device = device
        self.t2s: Any = self._model(TSARTransformer, t2s, dtype)
        self.s2a: Any = self._model(SADelARTransformer, s2a, dtype) if s2a else None
        self.vocoder = _vocoder(Path(vocoder), device) if vocoder else None
        self.sounds = self.t2s.stoks_codes - 1  # the last row of the codebook is the mask

    def _model(self, kind: Any, path: str, dtype: str) -> Any:
        spec = torch.load(path, map_location=self.device, weights_only=True)
        model = kind.load_model(spec=spec, device=self.device)
        model.optimize(dtype=getattr(torch, dtype), torch_compile=False)  # sets its caches up
        return model

    def speak(
        self,
        text: str,
        seed: int,
        cps: float,
        temperature: float,
        language: str,
        speaker: list[float] | None,
    ) -> dict[str, Any]:
        size, limit = len(text.strip().encode()), self.t2s.ttoks_len - 1
        if size > limit:  # the model would crop it, without a word
            return {"reject": f"too long: {size} bytes of text, at most {limit}"}
        torch.manual_seed(seed)
        codes = self.t2s.generate(
            text, cps=cps, lang=language, T=temperature, show_progress_bar=False
        )[0]
        if len(codes) == self.t2s.stoks_len - 1:
            return {"reject": f"unfinished: no end within {len(codes)} codes"}
        numbers = codes.tolist()
        if not numbers or max(numbers) >= self.sounds:
            return {"reject": "no sound: the codes are none, or hold one that is no sound"}
        if self.s2a is None or self.vocoder is None:
            return {"codes": numbers}
        embedding = Pipeline.default_speaker if speaker is None else torch.tensor(speaker)
        acoustic = self.s2a.generate(codes, embedding.unsqueeze(0), show_progress_bar=False)
        if not acoustic.numel() or int(acoustic.max()) >= ACOUSTIC_CODES:
            return {"reject": "no sound: the acoustic codes are none, or hold one that is no sound"}
        samples = self.vocoder.decode(acoustic)[0].float().cpu().numpy()
        return {"samples": base64.b64encode(samples.tobytes()).decode(), "rate": 24_000}


def _vocoder(folder: Path, device: str) -> Any:
    """Vocos from its config.yaml and pytorch_model.bin. EnCodec's encoder, which decoding does not
    use, is not fetched: its weights are random."""
    from encodec import EncodecModel
    from vocos import Vocos

    fetched = EncodecModel.encodec_model_24khz
    EncodecModel.encodec_model_24khz = staticmethod(lambda pretrained: fetched(pretrained=False))
    model = Vocos.from_hparams(str(folder / "config.yaml"))
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    encoder = "feature_extractor.encodec."
    left = {key: value for key, value in model.state_dict().items() if key.startswith(encoder)}
    model.load_state_dict({**left, **state})
    vocoder = Vocoder.__new__(Vocoder)  # its __init__ would fetch
    vocoder.device, vocoder.vocos = device, model.eval().to(device)
    return vocoder


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    torch.set_num_threads(1)
    speaker = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if speaker is None:
                speaker = Speaker(**request)
                answer: dict[str, Any] = {"ready": {name: version(name) for name in PACKAGES}}
            else:
                answer = speaker.speak(**request)
        except Exception as error:  # whatever it is, the other side says it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()
