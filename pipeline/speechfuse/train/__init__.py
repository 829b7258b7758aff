"""Training: the loop of the language model, its parts, and the training of a quantizer."""
