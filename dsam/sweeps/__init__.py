"""Many runs: planned together, started, watched and concluded; on this machine or on a cluster."""
