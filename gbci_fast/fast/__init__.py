"""The fast path: `accelerate`, its decision, its samplers, and what executes the UNet."""
