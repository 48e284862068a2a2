"""What a client of federated learning sends and does, and what its gradient says by itself."""
