"""``.pt`` files without an unpickler."""
