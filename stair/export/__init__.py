"""From an index, or a model, to what other software takes; every format has a test that compares its scores."""
