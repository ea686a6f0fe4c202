"""Language models: loaded, inspected and prepared for training."""
