"""High-throughput generation of synthetic data sets."""
