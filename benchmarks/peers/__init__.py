"""The round of benchmarks/round_trip.py on other systems, each in a virtual environment of its own."""
