"""HSWQ's mathematics and file formats, on torch (with its filelock), safetensors and the standard library.

The command line adds tqdm. Nothing here imports ComfyUI. Rooms, each importing only from those above it:

errors, progress  the errors raised and the progress reported everywhere else
devices           what torch's devices can do
files             reading and writing files, ``.pt`` and safetensors
quant             number formats, clip search, second moments, compensated rounding, error measures
model             layers and their kinds, families, presets, fingerprints
calibration       observers, sessions, recorded calls
plan              plans, budgets, file formats
methods           hswq, nearest, learned, and the code they share
convert           plan to file, file to file
reports           reports on sessions and files
cli               ``python -m hswq_core``
"""
