"""What an eviction takes away and keeps outside of the cache, so that it can come back."""
