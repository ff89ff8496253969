"""A trained bundle as one signed archive, and everything that a hospital can check before it trusts it."""
