"""What must be known of a model."""
