"""Writers of synthetic images, one module per format."""
