"""The figures that the documentation states, measured: ``python -m benchmarks``."""
