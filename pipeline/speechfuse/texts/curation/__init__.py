"""What is kept of instruction text: a step a file, in YAML speechfuse.texts.STEP."""
