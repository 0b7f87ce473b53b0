"""Processes killed while they calibrate or convert, and what they leave behind."""
