"""What callers see: `LLM`, `AsyncLLM`, their parameters and outputs."""
