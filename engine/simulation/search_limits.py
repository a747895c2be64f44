"""How far the search of a topology goes by default; apart from the search, so that a command can name them at once."""

SIMULATED_TOPOLOGIES = 12  # in the search itself
SIMULATED_REQUESTS = 2000  # of the workload, the first so many
