"""What a checkpoint knows, in text and by ear: tasks, cells (checkpoint, task), the sweep."""

COMPONENTS = {  # name in YAML, below speechfuse.evals: where it stands
    "Harness": "harness.Harness",
    "SpliceGenerator": "splice.SpliceGenerator",
    "Speech": "speech.Speech",
}
