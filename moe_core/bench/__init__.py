"""How fast this project's models train on this machine, beside what else is installed: ``moe bench``."""
