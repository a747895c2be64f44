"""Performs actions on devices: steps, programs, KV arrays, transfers."""
