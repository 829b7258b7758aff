"""Waveforms to codes and back: codecs, which a model that speaks predicts the codes of."""

COMPONENTS = {  # name in YAML, below speechfuse.codecs: where it stands
    "dac": "hugging_face.dac",
    "encodec": "hugging_face.encodec",
    "mimi": "hugging_face.mimi",
    "patches": "patches.load",
}
