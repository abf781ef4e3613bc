"""What finished models score: held-out text, and lm-eval's tasks, several models side by side."""
