"""Evaluation by lm-evaluation-harness: what its requests mean here, and the model class that it drives."""
