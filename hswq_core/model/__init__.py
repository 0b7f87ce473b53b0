"""What a model is made of: layers and their kinds, families, presets, the fingerprint that tells models apart."""
