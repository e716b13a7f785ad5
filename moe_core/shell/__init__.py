"""What ``moe ...`` does, verb by verb, and what it prints."""
