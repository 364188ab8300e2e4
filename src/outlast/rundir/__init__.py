"""What a run leaves on disk: its directory, ledger, progress, sweep manifest and submission."""
