"""lm-eval's tasks, with its own prompts and metrics."""
