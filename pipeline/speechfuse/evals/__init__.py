"""What a checkpoint knows, in text and by ear: tasks, cells (checkpoint, task), the sweep."""

COMPONENTS = {  # name in YAML, below speechfuse.evals: where it stands
    "Harness": "harness.Harness",
    "Sessions": "sessions.Sessions",
    "SpliceGenerator": "splice.SpliceGenerator",
    "Speech": "speech.Speech",
    "States": "states.States",
}
