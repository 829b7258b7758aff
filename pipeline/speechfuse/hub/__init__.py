"""The Hugging Face Hub: reading at a commit, pushing, cards."""
