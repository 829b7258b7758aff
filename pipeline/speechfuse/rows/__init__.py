"""Codes at rest: the schema of rows, shards, rejects, statistics, verification."""
