"""Artifacts to tables for people."""
