"""What sessions and files say about themselves, as data and Markdown."""
