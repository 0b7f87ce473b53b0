"""Turns plans into files: header, output tensors, and file-to-file conversion without a model in memory."""
