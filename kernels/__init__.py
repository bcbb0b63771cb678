"""Triton kernels, one file per operator; importing this package imports neither Triton nor a
kernel.
"""
