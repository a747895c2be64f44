"""Sizes and places that compiled kernels and the process that loads them agree on. Without numba, for every start."""

MOST_ROWS = 64  # of a step of decode; a call over more is a prompt's
JOB_BYTES = 48 * 8  # of a job, in words of 8 bytes: see `kernel.py`

# What belongs to the process, by word; the loader writes it once the code is in memory.
PROCESS = "twinmesh_process"
RING, JOBS, TURN, TASK, THREADS = range(5)  # addresses, but for the number of jobs
PROCESS_WORDS = 5
