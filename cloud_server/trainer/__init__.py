"""The trainer, a separate process and the only part of the server that imports torch."""
