"""One experiment per file, each with its claims."""
