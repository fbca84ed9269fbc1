"""Side by side: transformers' Trainer and ours, in turns in one run, medians and ratios."""
