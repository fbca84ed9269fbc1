"""What a model learns to predict: each objective's collator and its evaluation."""
