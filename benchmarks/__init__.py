"""Benchmarks: `python -m benchmarks.NAME`; each writes `benchmarks/NAME/results/*.json`."""
