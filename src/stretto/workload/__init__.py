"""What is to be done: a model as arithmetic, the job, and its limits."""
