"""Times of the ops on a GPU, the baselines beside them. Run as ``python -m kvzip_press.kernels.benchmarks.<op>``."""
