"""Denoising on several devices: guidance and steps in parallel, for any diffusers pipeline."""
