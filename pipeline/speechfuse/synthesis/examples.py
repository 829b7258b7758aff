"""Names of the example files beside a shard: audio of some samples, kept to be listened to."""

EXAMPLES = "examples.json"  # numbers of the shard's rows whose audio is kept: [number, ...]


def example_name(row: int, piece: int) -> str:
    """Return how the file name of a piece of speech ends; it begins with the shard's name."""
    return f"{row:05d}-{piece}.flac"
