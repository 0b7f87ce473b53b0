"""Judges methods by the pictures of the reference models: files on disk, opened by the loaders people use."""
