"""One attempt of one rank: its steps, its saves, and what it resumes from."""
