"""Training on a user's images."""
