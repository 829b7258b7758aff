"""Speakers for WhisperSpeech from recordings of them; runs in its environment, never imported.

    .venv-whisperspeech/bin/python -P .../synthesis/engines/whisperspeech_speakers.py \\
        models/ecapa/embedding_model.ckpt RECORDINGS speakers.json

In: the embedding model of speechbrain/spkrec-ecapa-voxceleb (on the Hub) and a folder of .wav or
.flac files, one a speaker, of which the first 30 s count. Out: JSON {file's name: 192 numbers}, for
TextToWaveform's `speakers`. Same steps as Pipeline.extract_spk_emb of whisperspeech 0.8.9, without
the YAML of the published model, which would run what it holds.
"""

import json
import sys
from pathlib import Path

import soundfile
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from torchaudio.functional import resample

RATE, SECONDS = 16_000, 30


def model() -> torch.nn.Module:
    """The shape of spkrec-ecapa-voxceleb."""
    return ECAPA_TDNN(
        80,
        channels=[1024] * 4 + [3072],
        kernel_sizes=[5, 3, 3, 3, 1],
        dilations=[1, 2, 3, 4, 1],
        attention_channels=128,
        lin_neurons=192,
    ).eval()


@torch.inference_mode()
def main(checkpoint: str, folder: str, out: str) -> None:
    ecapa = model()
    ecapa.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    features, normalise = Fbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False)
    speakers = {}
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".wav", ".flac")):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = torch.from_numpy(samples[: SECONDS * rate].mean(axis=1))[None]
        length = torch.ones(1)
        seen = normalise(features(resample(mono, rate, RATE)), length)
        speakers[path.stem] = ecapa(seen, length)[0, 0].tolist()
    if not speakers:
        sys.exit(f"error: {folder} holds no .wav or .flac file")
    Path(out).write_text(json.dumps(speakers))
    print(f"{out}: {len(speakers)} speakers")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
