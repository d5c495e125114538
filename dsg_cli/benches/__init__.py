"""Benchmarks as lm-eval tasks."""
