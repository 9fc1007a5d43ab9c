"""From run folders to tables, figures and one report; nothing here trains or writes to a run."""
