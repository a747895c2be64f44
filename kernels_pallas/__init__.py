"""Paged attention and KV append: dispatch by platform."""
