"""Pure numerics: number formats, clip search, second moments, compensated rounding, error measures."""
