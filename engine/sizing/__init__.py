"""Sizes: what an engine gets by default, and how many pages its memory holds. Numbers alone, no devices."""
