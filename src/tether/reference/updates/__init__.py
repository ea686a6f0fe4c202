"""How a synchronized reference moves: the update rules, the tensors that move together, and an adapter's share of them."""
