"""Codes to token ids: the vocabulary, its expansion, and the one prompt builder."""

COMPONENTS = {  # name in YAML, below speechfuse.tokens: where it stands
    "codebook": "initialization.codebook",
    "mean": "initialization.mean",
    "mean_and_covariance": "initialization.mean_and_covariance",
    "normal": "initialization.normal",
    "read_form": "prompts.read_form",
    "read_spoken_answer": "prompts.read_spoken_answer",
}
