"""Speech that enters a language model as frames of an encoder, in place of an audio tag."""

COMPONENTS = {  # name in YAML, below speechfuse.fusion: where it stands
    "Channels": "channels.Channels",
    "Conformer": "adapters.Conformer",
    "Identity": "adapters.Identity",
    "Linear": "adapters.Linear",
    "Stack": "adapters.Stack",
    "conversations": "views.conversations",
    "duplex": "channels.duplex",
    "recordings": "recordings.recordings",
    "speech": "views.speech",
}
