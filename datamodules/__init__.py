"""Where pairs come from: streamed shards for training, exact sets for evaluation."""
