"""Judges that go wrong, for the measurement's own process to import. Light: it imports nothing."""


def raises(question, answer):
    raise ConnectionError("nobody there")
