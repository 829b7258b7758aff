"""Texts to spoken conversations: kinds of samples, voices (engines/), the round trip."""

COMPONENTS = {  # name in YAML, below speechfuse.synthesis: where it stands
    "Endpoint": "engines.endpoint.Endpoint",
    "Espeak": "engines.espeak.Espeak",
    "Instruction": "kinds.Instruction",
    "MultiTurn": "kinds.MultiTurn",
    "PartlySpoken": "kinds.PartlySpoken",
    "QuantizerDecoder": "round_trip.QuantizerDecoder",
    "Refusal": "kinds.Refusal",
    "Sessions": "sessions.Sessions",
    "Stereo": "stereo.Stereo",
    "Text": "kinds.Text",
    "TextAround": "kinds.TextAround",
    "TextToCodes": "engines.whisperspeech.TextToCodes",
    "TextToWaveform": "engines.whisperspeech.TextToWaveform",
    "Transcription": "kinds.Transcription",
    "TranscriptionEndpoint": "round_trip.TranscriptionEndpoint",
    "Whisper": "round_trip.Whisper",
    "silence": "kinds.silence",
}
