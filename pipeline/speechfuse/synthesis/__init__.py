"""Texts to spoken conversations: kinds of samples, voices (engines/), the round trip."""

COMPONENTS = {  # name in YAML, below speechfuse.synthesis: where it stands
    "QuantizerDecoder": "round_trip.QuantizerDecoder",
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
    "TranscriptionEndpoint": "round_trip.TranscriptionEndpoint",
    "Transcription": "kinds.Transcription",
    "silence": "kinds.silence",
}
