"""Measurements of every op against what one would write without it. `python benchmarks/run.py --help` is the way in."""
