"""Numbers from networks: what features and predictions are worth."""
