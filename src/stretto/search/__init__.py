"""Search for plans without a device: here the windows of step-parallel denoising."""
