"""What decides how each layer is stored: one module a method, and what methods share."""
