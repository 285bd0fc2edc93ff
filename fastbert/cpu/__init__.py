"""Kernels of a CPU: written as vectors (`code`), compiled in the process by llvmlite, run on torch's own threads."""
