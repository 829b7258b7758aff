"""RWKV-6 and RWKV-7: language models whose memory of what they have read has a fixed size."""
