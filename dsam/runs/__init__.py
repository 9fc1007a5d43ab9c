"""One run: what identifies it, what it leaves behind, and who else is working on it."""
