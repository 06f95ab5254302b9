"""How PreScope's built-in model is made: corpus, training, evaluation, routing metrics."""
