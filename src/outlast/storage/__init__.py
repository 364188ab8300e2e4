"""How many bytes there may be: the budget, a cell's share of it, and the file system."""
