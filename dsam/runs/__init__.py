"""Runs: what identifies one, what it leaves behind, and how many of them are swept."""
