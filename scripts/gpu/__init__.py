"""The parts of `scripts/gpu_check.py`, one file each."""
