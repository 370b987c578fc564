"""The trainer as a service: when it trains, what it writes down, and what one run does."""
