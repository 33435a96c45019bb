"""What an operator runs beside the server: check, token, agents, forget."""
