"""What the tests share: tiny models and pairs, runs of them, kinds of references, oracles."""
