"""The Hugging Face Trainer and DeepSpeed: what they do is steered, saved and restored here."""
