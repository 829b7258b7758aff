"""Files to waveforms, and waveforms to waveforms: decoding, filters, augmentation, espeak-ng."""

COMPONENTS = {  # name in YAML, below speechfuse.audio: where it stands
    "Gain": "augmentation.Gain",
    "Lossy": "augmentation.Lossy",
    "Noise": "augmentation.Noise",
    "Reverberation": "augmentation.Reverberation",
    "Silence": "augmentation.Silence",
    "Speed": "augmentation.Speed",
    "Telephone": "augmentation.Telephone",
    "babble": "augmentation.babble",
    "characters_per_second": "filters.characters_per_second",
    "clipping": "filters.clipping",
    "duration": "filters.duration",
    "level": "filters.level",
    "pink": "augmentation.pink",
    "speech_share": "filters.speech_share",
    "white": "augmentation.white",
}
