"""What calibration saw: observers, sessions and the model calls kept beside them."""
