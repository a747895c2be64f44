"""The measurements and checks that `gpu_suite.py` runs."""
