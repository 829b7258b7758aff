"""Training of a language model: the loop, its parts, and preflight/."""

COMPONENTS = {  # name in YAML, below speechfuse.train: where it stands
    "llama": "transformers_llama.llama",
    "next_frame": "losses.next_frame",
    "next_token": "losses.next_token",
    "rwkv": "rwkv.rwkv",
}
