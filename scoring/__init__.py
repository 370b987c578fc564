"""What is answered: the client for recommenders and the code Triton's models run."""
