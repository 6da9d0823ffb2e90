"""Chunk sizes for pipelines: a real pipeline, and simulated ones."""
