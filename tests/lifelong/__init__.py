"""Lifelong memories: bytes, laws, compaction, the batch builder, and what reads them."""
