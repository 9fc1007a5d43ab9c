"""The oracle: how near each weighting brings one perturbation for the batch to a perturbation for each example."""
