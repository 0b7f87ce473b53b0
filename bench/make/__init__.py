"""Generators of committed files: workflows and their pictures, locales, the icon."""
