"""The trainer: a process of its own, the only part of the server that imports torch."""
