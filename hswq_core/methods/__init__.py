"""Methods decide how each layer is stored: one module per method, plus the code they share."""
