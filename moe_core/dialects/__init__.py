"""The command lines of the users' own scripts, for :mod:`moe_core.commands`: their flags, and how a line is cut."""
