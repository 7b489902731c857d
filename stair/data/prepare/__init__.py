"""`stair prepare`: makes shards of images and captions. Each source is a subcommand (stair/cli.py)."""
