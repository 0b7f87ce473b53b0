"""Calibration data: observers, sessions and the model calls kept beside them."""
