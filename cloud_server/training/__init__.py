"""The trainer seen from the server: its jobs and its process."""
