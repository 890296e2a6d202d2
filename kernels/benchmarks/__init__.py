"""Times the ops on a GPU beside their baselines. Run as ``python -m kvzip_press.kernels.benchmarks.<op>``."""
