"""Attacks on a guarded model: each one file, each a function from model and questions to a curve."""
