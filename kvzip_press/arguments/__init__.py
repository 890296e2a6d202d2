"""What callers hand in, made into what the rooms take, or refused with a word on what to do."""
