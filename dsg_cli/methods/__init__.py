"""Ways to unlearn, one file each; names.py lists them, settings.py has what each can be told."""
