"""What happens once, when an engine starts."""
