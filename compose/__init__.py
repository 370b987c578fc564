"""What puts the parts together: settings, command line, local stack, demo, docker-compose."""
