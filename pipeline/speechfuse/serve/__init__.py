"""The model as a server: OpenAI's protocol, and a page to talk to it."""

COMPONENTS = {  # name in YAML, below speechfuse.serve: where it stands
    "Engine": "engine.Engine",
}
