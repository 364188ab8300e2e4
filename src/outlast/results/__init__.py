"""This room uses what came out of a run: it hands a model out, or tries it."""
