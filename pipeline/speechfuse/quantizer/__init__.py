"""Waveforms to codes, frames or words, and the training of a quantizer (training/)."""

COMPONENTS = {  # name in YAML, below speechfuse.quantizer: where it stands
    "concatenated": "foreign.concatenated",
    "of_fastconformer": "foreign.of_fastconformer",
    "of_quantizer": "frames.of_quantizer",
    "of_wavlm": "foreign.of_wavlm",
    "of_whisper": "frames.of_whisper",
    "phonemes": "training.phonemes.Phonemes",
    "recognizer": "recognizer.Recognizer",
    "whisper": "training.distillation.Whisper",
}
