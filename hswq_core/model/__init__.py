"""The parts of a model: layers and their kinds, families, presets, and the fingerprint that identifies it."""
