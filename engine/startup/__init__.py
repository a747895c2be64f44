"""Start-up: from options to a running engine."""
