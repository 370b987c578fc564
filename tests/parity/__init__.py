"""Parity: what is read online equals what the lake gives."""
