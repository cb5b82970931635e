"""From a batch and a model to a loss: one file per task, between the training loop and the model."""
