"""Container images, and the two small programs that build or probe them from inside."""
