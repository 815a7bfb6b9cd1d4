"""Kernels in Triton, for CUDA devices; under its interpreter they run anywhere."""
