"""KL: the next-token distribution on other-domain chats stays (arXiv 2602.07852)."""
