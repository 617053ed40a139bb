"""Nearest neighbours: the searches under the coreset and the memory bank."""
