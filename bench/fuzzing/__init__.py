"""Hostile input for the readers: seeds, mutations, targets, and attacks made by hand."""
