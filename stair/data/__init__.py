"""Reading image-text data: tars, tables, folders, remote shards. Every command reads through this package."""
