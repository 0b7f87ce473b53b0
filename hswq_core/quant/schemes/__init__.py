"""How one layer's weight can be stored and run: one file a scheme, one table of them all."""
