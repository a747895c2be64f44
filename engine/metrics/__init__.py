"""Timelines to latencies and counters. No JAX."""
