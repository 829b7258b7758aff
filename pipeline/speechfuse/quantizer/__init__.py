"""Waveforms to codes, and the training of a quantizer (training/)."""

COMPONENTS = {  # name in YAML, below speechfuse.quantizer: where it stands
    "phonemes": "training.phonemes.Phonemes",
    "whisper": "training.distillation.Whisper",
}
