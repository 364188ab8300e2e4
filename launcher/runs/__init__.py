"""Runs read back: where they stand, what the queue holds, their attempts."""
