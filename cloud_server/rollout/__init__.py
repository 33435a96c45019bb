"""Which round's model is for which agent: the canary, the pin, and what was withdrawn."""
