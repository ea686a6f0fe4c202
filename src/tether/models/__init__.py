"""Language models: loaded, looked at and prepared for training."""
