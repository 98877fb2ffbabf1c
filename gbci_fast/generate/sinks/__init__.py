"""How synthetic images are written, a module per format."""
