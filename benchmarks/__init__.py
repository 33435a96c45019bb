"""Benchmarks of speed, memory and bytes on the wire; each command prints its figures as one line of JSON."""
