"""Who may come in, how often, and over how many connections."""
