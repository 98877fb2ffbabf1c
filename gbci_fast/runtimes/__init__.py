"""What executes the UNet: implementations of `gbci_fast.denoiser.Denoiser`, one per file."""
