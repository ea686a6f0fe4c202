"""How a synchronized reference moves: update rules, groups of tensors that move together, and an adapter's groups."""
