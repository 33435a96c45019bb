"""What is seen of a run: by agents, on the status page, at the terminal, and in reports."""
