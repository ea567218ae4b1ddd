"""What a GPU would be asked to do, counted without one: `python -m tests.gpu_path` prints the table."""
