"""Rows to samples, and samples to packs and batches."""

COMPONENTS = {  # name in YAML, below speechfuse.samples: where it stands
    "answer": "instructions.answer",
    "context": "instructions.context",
    "conversations": "datasets.conversations",
    "count_words": "instructions.count_words",
    "sound": "datasets.sound",
    "speech": "datasets.speech",
    "transcribe": "instructions.transcribe",
}
