"""Speed, memory and bytes against the limits and the peers; each command prints one JSON line."""
