"""Waveforms to codes, frames or words, and the training of a quantizer (training/)."""

COMPONENTS = {  # name in YAML, below speechfuse.quantizer: where it stands
    "of_quantizer": "frames.of_quantizer",
    "of_whisper": "frames.of_whisper",
    "phonemes": "training.phonemes.Phonemes",
    "recognizer": "recognizer.Recognizer",
    "whisper": "training.distillation.Whisper",
}
