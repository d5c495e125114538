"""Figures of a report, one kind a file, in one style."""
