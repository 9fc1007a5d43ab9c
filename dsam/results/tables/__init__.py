"""The tables of an experiment: built from collected runs, and rendered for terminal, paper and page."""
