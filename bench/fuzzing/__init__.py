"""Hostile input for the readers: seeds, mutations, targets, and hand-made attacks."""
