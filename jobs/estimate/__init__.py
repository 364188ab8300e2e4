"""Estimates how many bytes a run will write."""
