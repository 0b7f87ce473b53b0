"""The rig: a real ComfyUI, small enough for tests, the demo and the benchmarks.

Import it with `bench/` on sys.path. The repository root must never be there: its
folder `nodes/` would hide ComfyUI's own module `nodes`.
"""
