"""SCBench as KVzip prepared it."""
