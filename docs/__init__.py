"""The generator of the reference; the package does not ship it."""
