"""What is done to a state directory beside the rounds: clean-ups, provenance, forgetting."""
