"""`stair prepare`: makes shards of images and captions. Each source is a subcommand (stair/commands.py)."""
