"""Speech that enters a language model as frames of an encoder, in place of an audio tag."""

COMPONENTS = {  # name in YAML, below speechfuse.fusion: where it stands
    "Conformer": "adapters.Conformer",
    "Identity": "adapters.Identity",
    "Linear": "adapters.Linear",
    "Stack": "adapters.Stack",
    "conversations": "views.conversations",
    "recordings": "recordings.recordings",
    "speech": "views.speech",
}
