"""Triton kernels, one file per operator. Installed as fastalex.kernels.

Importing this package imports neither Triton nor a kernel: _refuse.py says why a call is not
served.
"""
