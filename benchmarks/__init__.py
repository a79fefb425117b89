"""Benchmarks of gradaug_kernels against stock PyTorch."""
