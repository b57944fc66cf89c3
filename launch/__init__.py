"""Launchers, scaling benchmarks and the cost model."""
