"""Loads run on engines, real and simulated: drivers, presets shaped like the field's benchmarks, and their report."""
