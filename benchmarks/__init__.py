"""Benchmarks of mvpfx: one file a question; figures go to results/."""
