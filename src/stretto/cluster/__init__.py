"""What a job runs on: devices, nodes and links, from a preset, a probe or a file."""
