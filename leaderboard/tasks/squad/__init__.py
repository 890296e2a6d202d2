"""SQuAD, all questions of a paragraph together."""
