"""The three servers on one Linux machine, started and supervised without Docker."""
