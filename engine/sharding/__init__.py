"""Meshes, sharding rules, weights."""
