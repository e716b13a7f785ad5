"""What a run's file is made of, for :mod:`moe_core.store`: its schema, its connections, its rows."""
