"""Commands: one file each, imported only when called. The only package that prints."""
