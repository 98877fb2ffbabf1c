"""The fast path: `accelerate`, its decision, its samplers, and the runtimes that execute the UNet."""
