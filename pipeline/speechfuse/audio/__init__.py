"""Files to waveforms, and waveforms to waveforms: decoding, filters, augmentation, espeak-ng."""

from speechfuse.config import face

COMPONENTS = face(  # names in YAML, below speechfuse.audio, by the module in which they stand
    {
        "augmentation": "Gain Lossy Noise Reverberation Speed Telephone babble pink white",
        "filters": "characters_per_second clipping duration level speech_share",
    }
)
