"""What the cluster's shell sees: batch scripts, the prologue, the devcluster."""
