"""Ways to store and run a layer's weight: one file per scheme, and a table of all of them."""
