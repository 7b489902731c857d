"""The command line of training: its parser, its settings, and what a stage's folder makes of them."""
