"""Triton kernels, one file per operator; each ends with launchers that have the operator's own signatures.

Importing this package needs triton and no GPU. Which launchers serve a convolution is decided in _gpu/paths.py.
"""
