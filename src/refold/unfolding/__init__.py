"""Training-time branches for any model, at nearly the price of one."""
