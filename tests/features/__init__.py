"""The state machine and its bytes."""
