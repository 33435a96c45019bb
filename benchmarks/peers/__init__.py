"""The round of benchmarks/round_trip.py on other systems, each in its own virtual environment."""
