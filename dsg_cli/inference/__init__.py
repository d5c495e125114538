"""Log-likelihoods and text under guardrails and wrappers."""
