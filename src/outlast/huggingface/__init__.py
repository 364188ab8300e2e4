"""Steers the Hugging Face Trainer and DeepSpeed, and saves and restores their state."""
