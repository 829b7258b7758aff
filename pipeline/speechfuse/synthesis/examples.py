"""Names of the example files beside a shard: audio of some samples, kept to be listened to."""

EXAMPLES = "examples.json"  # numbers of the shard's rows whose audio is kept: [number, ...]


def example_name(row: int, piece: int) -> str:
    """Returns the name of the audio of one piece of speech of a row, behind the shard's own."""
    return f"{row:05d}-{piece}.flac"
