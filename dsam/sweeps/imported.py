"""Imported last by the process that runs are forked from: which code it has imported, whatever the files become later.

A run's provenance looks both up when the run starts, hours later perhaps, and then finds what was found here.
"""

from ..runs.provenance import git, source_digest

git()
source_digest()
