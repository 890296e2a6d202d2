"""Python's language reference as documents."""
