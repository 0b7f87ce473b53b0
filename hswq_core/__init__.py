"""HSWQ's mathematics and file formats: torch, safetensors and the standard library (its command line: tqdm too).

Imports no ComfyUI. Rooms, each importing only from those above it in this list:

errors, progress  what everything else raises and reports
files             reading and writing files, ``.pt`` and safetensors
quant             number formats, clip search, second moments, compensated rounding, error measures
model             layers and their kinds, families, presets, fingerprints
calibration       observers, sessions, recorded calls
plan              plans, budgets, file formats
methods           hswq, nearest, learned, and what methods share
convert           plan to file, file to file
reports           what sessions and files say about themselves
cli               ``python -m hswq_core``
"""
