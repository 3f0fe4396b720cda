"""Measurements, each beside the limit it is measured against; results lie in `results/`."""
