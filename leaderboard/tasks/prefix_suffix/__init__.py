"""The entry that begins and ends as asked."""
