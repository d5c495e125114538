"""The language model and the SAE."""
