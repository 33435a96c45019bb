"""What an operator runs beside the server: check, doctor, status, token, agents, forget."""
