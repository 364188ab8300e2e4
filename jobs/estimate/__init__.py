"""How many bytes a run will write."""
