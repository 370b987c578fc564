"""Questions about speed and quality, each with the command that answers it."""
