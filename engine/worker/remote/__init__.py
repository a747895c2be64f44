"""Meshes of other processes: the driver's executor and its workers, and what performs commands within a worker."""
