"""Pages that show what a model learned: one HTML file, without a server or the network."""
