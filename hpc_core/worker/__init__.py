"""One process: job in, record out."""
