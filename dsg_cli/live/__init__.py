"""The live page: a prompt, what the gate saw of it, and both answers, in a browser on this machine."""
