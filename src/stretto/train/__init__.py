"""A compact trainer: text as bytes, GPT and DiT presets, shards, exact resume."""
