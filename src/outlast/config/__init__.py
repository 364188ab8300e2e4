"""What may be configured: sections, the check of each key, and the file that freezes them."""
