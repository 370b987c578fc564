"""How events move: producer, worker, lake sink, catalogue."""
