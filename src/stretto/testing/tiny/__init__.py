"""Builders of tiny random-weight diffusers pipelines, one file per kind of denoiser."""
