"""A page on which prompts are tried."""
