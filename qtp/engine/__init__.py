"""Requests, the scheduler and the engine loop, on rank 0. Imports neither torch nor anything of worker, models or layers."""
