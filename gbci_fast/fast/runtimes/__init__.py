"""The runtimes that execute the UNet: one `gbci_fast.fast.denoiser.Denoiser` per file."""
