"""How a synchronized reference moves: update rules, tensors that move together, and an adapter's share of them."""
