"""GSM8K as KVzip poses it: the problem is the context, its last sentence the question."""
