"""The language between control plane and executor: plain data that survives bytes.

Imports neither JAX nor anything else of the engine.
"""
