"""The rows of the Jacobian: factors, ownership, rules, the general path and the products."""
