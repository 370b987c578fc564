"""Learning: from the event log to an exported retrieval model."""
