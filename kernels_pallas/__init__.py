"""Kernels, and what they read: attention over pages (`attention.py`), products (`matmul.py`), formats of weights
(`formats/`). Importing the package itself imports nothing, so that plain data in it is to be had without JAX.
"""
