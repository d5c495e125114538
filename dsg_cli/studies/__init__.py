"""Sweeps that reuse what is already computed: one file a study (names.py lists them, rig.py is what all begin with)."""
