"""Answers of finished runs to GLUE's test sets and to AX."""
