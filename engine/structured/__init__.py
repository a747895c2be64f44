"""Structured output: answers that keep to a JSON schema, a regular expression, choices or a grammar. No JAX."""
