"""Files on disk: treated as untrusted when read, written atomically."""
