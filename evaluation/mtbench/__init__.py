"""MT-Bench: questions, answers and grades."""
