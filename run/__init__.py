"""Programs put together: what sees all other packages. scripts/ parses the arguments."""
