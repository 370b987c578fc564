"""A seeded world in one process: the worker's own code between a simulated Kafka and Redis."""
