"""A bank's manual for its support desk as documents."""
