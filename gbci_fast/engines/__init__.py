"""TensorRT engines: what can build and run them, how they are built, kept and run."""
