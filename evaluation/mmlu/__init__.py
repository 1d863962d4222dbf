"""MMLU: its questions, prompts and answers."""
