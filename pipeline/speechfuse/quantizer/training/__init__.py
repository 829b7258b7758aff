"""How a quantizer is trained."""
