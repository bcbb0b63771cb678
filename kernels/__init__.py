"""Triton kernels, one file per operator. Installed as fastalex.kernels."""
