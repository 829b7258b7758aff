"""Texts to spoken conversations: kinds of samples, voices (engines/), the round trip."""

from speechfuse.config import face

COMPONENTS = face(  # names in YAML, below speechfuse.synthesis, by the module in which they stand
    {
        "engines.endpoint": "Endpoint",
        "engines.espeak": "Espeak",
        "engines.whisperspeech": "TextToCodes TextToWaveform",
        "kinds": "Instruction MultiTurn PartlySpoken Refusal Text TextAround Transcription silence",
        "round_trip": "QuantizerDecoder TranscriptionEndpoint",
    }
)
