"""Sampling on the device, and its state."""
