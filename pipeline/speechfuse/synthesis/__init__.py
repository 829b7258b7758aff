"""Texts to spoken conversations: kinds of samples, voices (engines/), the round trip."""

COMPONENTS = {  # name in YAML, below speechfuse.synthesis: where it stands
    "CodecDecoder": "round_trip.CodecDecoder",
    "Endpoint": "engines.endpoint.Endpoint",
    "Espeak": "engines.espeak.Espeak",
    "Instruction": "kinds.Instruction",
    "MultiTurn": "kinds.MultiTurn",
    "PartlySpoken": "kinds.PartlySpoken",
    "Refusal": "kinds.Refusal",
    "Text": "kinds.Text",
    "TextAround": "kinds.TextAround",
    "TextToCodes": "engines.whisperspeech.TextToCodes",
    "TextToWaveform": "engines.whisperspeech.TextToWaveform",
    "Transcriber": "round_trip.Transcriber",
    "Transcription": "kinds.Transcription",
    "silence": "kinds.silence",
}
