"""Reports on sessions and files, as data and Markdown."""
