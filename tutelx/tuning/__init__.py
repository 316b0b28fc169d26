"""What is known of speed: the machine, what was measured on it, what can run, and a model of what it should take."""
