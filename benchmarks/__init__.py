"""Benchmarks of gradaug_kernels against stock PyTorch."""

import os

# Read when torch is loaded. cuDNN's plans are keyed by exact sizes, of which random widths make more than the 10,000
# that torch keeps; the profiler, which measures memory, else writes lines to stderr whenever it starts.
os.environ.setdefault("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "1000000")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
