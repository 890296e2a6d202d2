"""Say a paragraph once more that was said many times."""
