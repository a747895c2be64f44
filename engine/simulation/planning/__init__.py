"""Which topology to run a model with: the candidates, a forecast of each, the search and its answer. No JAX."""
