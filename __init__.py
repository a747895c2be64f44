"""Twinmesh: LLM inference in JAX with prefill and decode on meshes of their own."""
