"""Chat templates and conversations: what stands before, between and in the turns, in text and in tokens."""
