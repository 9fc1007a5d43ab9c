"""The Hugging Face hub: complete, checked local folders of its repositories. It is asked here and nowhere else."""

from .snapshot import require_commit, snapshot

__all__ = ["require_commit", "snapshot"]
